"""What an answer earns: parts that add up, each kept apart so that it can be logged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from rlhf_core.config import PPOConfig
from rlhf_core.evaluation.text_metrics import repeated_share
from rlhf_core.generation import Generation

Messages = list[dict[str, str]]


class Scorer(Protocol):
    """A reward model. It is given texts, so its tokenizer and template may differ from the policy's."""

    def score(self, conversations: Sequence[Messages], responses: Sequence[str]) -> list[float]: ...


class RewardFunction(Protocol):
    """A user's own reward, on the text of the last turn and of the answer."""

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]: ...


def reward_parts(
    scorer: Scorer,
    function: RewardFunction | None,
    config: PPOConfig,
    conversations: Sequence[Messages],
    answers: Sequence[Generation],
) -> dict[str, Tensor]:
    """The parts of the reward by name, (B,) float32 each; penalties are negative, and absent when off."""
    texts = [answer.text for answer in answers]
    parts = {"reward_model": torch.tensor(scorer.score(conversations, texts))}
    if function is not None:
        prompts = [messages[-1]["content"] for messages in conversations]
        parts["function"] = torch.tensor(function.score(prompts, texts))
    penalties = {
        "missing_eos": (config.missing_eos_penalty, [not answer.finished for answer in answers]),
        "length": (config.length_penalty, [len(answer.token_ids) for answer in answers]),
        "repetition": (config.repetition_penalty, [repeated_share([text]) for text in texts]),
    }
    for name, (price, amounts) in penalties.items():
        if price > 0.0:
            parts[name] = -price * torch.tensor(amounts, dtype=torch.float32)
    return parts
