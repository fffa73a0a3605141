"""What PPO asks of whoever writes its rollouts, and the engine that needs nothing but this project."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from rlhf_core.config import Params, SamplingConfig
from rlhf_core.generation import Generation, generate
from rlhf_core.layout import Layout
from rlhf_core.modeling.roles import Roles
from rlhf_core.rollout_engines import vllm


class RolloutEngine(Protocol):
    def answer(
        self,
        roles: Roles,
        conversations: Sequence[list[dict[str, str]]],
        sampling: SamplingConfig,
        *,
        samples_per_prompt: int,
        batch_size: int,
        only: Sequence[int] | None = None,
    ) -> list[list[Generation]]:
        """Answers by the role "policy" as it is now; order, `only` and randomness as `generate` has them."""
        ...


class OwnEngine:
    """`generation.generate`, with the model that is trained."""

    def answer(
        self,
        roles: Roles,
        conversations: Sequence[list[dict[str, str]]],
        sampling: SamplingConfig,
        *,
        samples_per_prompt: int,
        batch_size: int,
        only: Sequence[int] | None = None,
    ) -> list[list[Generation]]:
        with roles.using("policy") as model:
            return generate(
                model,
                roles.tokenizer,
                conversations,
                sampling,
                samples_per_prompt=samples_per_prompt,
                batch_size=batch_size,
                only=only,
            )


def open_engine(
    params: Params,
    layout: Layout,
    conversations: Sequence[list[dict[str, str]]],
    say: Callable[[str], None],
) -> AbstractContextManager[RolloutEngine]:
    """The engine of `ppo.rollout_engine`, before any model is loaded: a server takes its memory first.

    `conversations` are all that it may be asked to answer; `say` is told what is waited for.
    """
    if params.ppo.rollout_engine == "vllm":
        return vllm.opened(params, layout, conversations, say)
    return nullcontext(OwnEngine())
