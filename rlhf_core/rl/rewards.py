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

    def member_scores(self, conversations: Sequence[Messages], responses: Sequence[str]) -> Tensor:
        """Normalised, (members of the ensemble, B)."""
        ...


class RewardFunction(Protocol):
    """A user's own reward, on the text of the last turn and of the answer."""

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]: ...


class ScoreShaper:
    """Scales and clips the scores before they become rewards; the scores that are logged stay as they are.

    `running` divides by the standard deviation of all scores so far, so the price of KL keeps its meaning
    while scores grow; `batch` makes each rollout's scores mean 0 and deviation 1.
    """

    def __init__(self, config: PPOConfig) -> None:
        self._scaling, self._clip = config.score_scaling, config.score_clip
        self.count, self.mean, self.square = 0, 0.0, 0.0  # square: summed squared distance from the mean

    def __call__(self, scores: Tensor) -> Tensor:
        """(B,) -> (B,)."""
        if self._scaling == "running":
            self._note(scores.double())
            scores = scores / max((self.square / self.count) ** 0.5, 1e-8)
        elif self._scaling == "batch":
            scores = (scores - scores.mean()) / (scores.std(unbiased=False) + 1e-8)
        return scores.clamp(-self._clip, self._clip) if self._clip > 0.0 else scores

    def _note(self, scores: Tensor) -> None:
        """Add to the moments (Chan et al. 1979)."""
        count, mean = len(scores), scores.mean().item()
        total, apart = self.count + count, mean - self.mean
        self.square += scores.var(unbiased=False).item() * count + apart**2 * self.count * count / total
        self.mean += apart * count / total
        self.count = total

    def state(self) -> list[float]:
        return [self.count, self.mean, self.square]

    def load(self, state: Sequence[float]) -> None:
        self.count, self.mean, self.square = int(state[0]), state[1], state[2]


def reward_parts(
    scorer: Scorer,
    function: RewardFunction | None,
    config: PPOConfig,
    conversations: Sequence[Messages],
    answers: Sequence[Generation],
) -> dict[str, Tensor]:
    """The parts of the reward by name, (B,) float32 each; penalties are negative, and absent when off."""
    texts = [answer.text for answer in answers]
    members = scorer.member_scores(conversations, texts)
    parts = {"reward_model": members.mean(dim=0)}
    if config.ensemble != "mean":
        parts["disagreement"] = disagreement(members, config)
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


def disagreement(members: Tensor, config: PPOConfig) -> Tensor:
    """What doubt takes from the mean of an ensemble, (members, B) -> (B,), never positive.

    `worst` leaves the lowest score, `uncertainty` takes off the variance times its price, WCO and UWO of
    Coste et al. (2023).
    """
    if config.ensemble == "worst":
        return members.min(dim=0).values - members.mean(dim=0)
    return -config.uncertainty_coef * members.var(dim=0, unbiased=False)
