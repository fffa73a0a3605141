"""A version of a policy, and the same when it is loaded and answers."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_core.config import RunConfig, SamplingConfig
from rlhf_core.errors import InputError
from rlhf_core.modeling.encoding import encode_prompt
from serving.batch import Failure, Order, Piece
from serving.engine import Engine
from serving.errors import bad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WARM_UP = [{"role": "user", "content": "Hello"}]


@dataclass(frozen=True)
class Version:
    """What answers: a registered model with its version, or a directory with a hash of its weights."""

    name: str
    number: str

    @property
    def label(self) -> str:
        return f"{self.name}/{self.number}"


@dataclass(frozen=True)
class Capacity:
    """How much is done at once. `context`: tokens of a prompt with its answer, 0 for what the model can."""

    slots: int = 8
    queue: int = 32
    context: int = 2048


class Live:
    """A loaded version with its engine. `users` counts requests that hold it; `Fleet` alone changes it."""

    def __init__(
        self,
        version: Version,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        capacity: Capacity,
    ) -> None:
        self.version, self.since, self.users = version, time.time(), 0
        most = getattr(model.config, "max_position_embeddings", None) or capacity.context
        self.context = min(most, capacity.context or most)
        self._tokenizer, self._lock = tokenizer, threading.Lock()
        self.engine = Engine(
            model,
            tokenizer,
            slots=capacity.slots,
            queue=capacity.queue,
            longest=self.context,
            name=version.label,
        )

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The prompt's token ids. Raises ApiError when the model's chat template refuses the messages."""
        from jinja2 import TemplateError

        try:
            with self._lock:  # tokenizers are not made for several threads
                return encode_prompt(self._tokenizer, messages)
        except TemplateError as error:
            raise bad("messages", f"the model's chat template refuses them: {error}") from None

    def warm_up(self, copies: int) -> None:
        """Answer once, with all slots, so that a model that cannot is found out. Raises InputError."""
        ended, failures = threading.Semaphore(0), []

        def sink(event: Piece | Failure) -> None:
            if isinstance(event, Failure):
                failures.append(event.message)
                ended.release(copies)
            elif event.finish:
                ended.release()

        sampling = SamplingConfig(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=3, seed=0)
        self.engine.submit(Order(self.encode(WARM_UP), sampling, copies, (), sink))
        for _ in range(copies):
            ended.acquire()
        if failures:
            raise InputError(f"{self.version.label}: {failures[0]}")

    def close(self) -> None:
        self.engine.close()


def load(version: Version, directory: Path, run: RunConfig, capacity: Capacity) -> Live:
    """Open the weights in `directory`. Raises InputError for a model that is damaged or does not answer."""
    import torch

    from rlhf_core.modeling.loading import load_policy

    model, tokenizer = load_policy(directory, run)
    ids = torch.tensor([encode_prompt(tokenizer, WARM_UP)], device=model.device)
    with torch.inference_mode():
        if not bool(model(input_ids=ids).logits.isfinite().all()):
            raise InputError(f"{directory}: damaged weights: what they compute is not finite")
    live = Live(version, model, tokenizer, capacity)
    try:
        live.warm_up(capacity.slots)
    except BaseException:
        live.close()
        raise
    return live


def digest_of(directory: Path) -> str:
    """Twelve digits that tell the weights in a directory from others."""
    total = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:12]
