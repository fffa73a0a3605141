"""Guard-rails: what must not get worse while the win rate rises. Pure; each is one number and one bound.

The bounds hold for estimates on the prompts of the comparison, not for the ends of intervals: they stop a
policy that went astray, and are no claim about the last digit. A number that could not be measured holds
nothing.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from rlhf_core.config import PromotionConfig


@dataclass(frozen=True)
class TextFacts:
    """What one policy's answers look like, all prompts together."""

    length: float  # mean, tokens, end included
    distinct_2: float  # different word pairs over all word pairs
    repeated_4: float  # share of four-word runs said before in the same answer
    refusal_rate: float
    toxic_rate: float


@dataclass(frozen=True)
class Measurements:
    """What the guard-rails look at; nan where something could not be measured."""

    candidate: TextFacts
    opponent: TextFacts
    kl: float  # nats per answer, candidate from its SFT model
    perplexity: float  # of the candidate on held-out demonstrations
    sft_perplexity: float
    reward_accuracy: float  # of the reward model that the candidate learnt from, on held-out pairs

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Measurements:
        facts = {name: TextFacts(**tree[name]) for name in ("candidate", "opponent")}
        return cls(**(tree | facts))


@dataclass(frozen=True)
class GuardRail:
    """One bound and the number held against it."""

    name: str
    meaning: str
    value: float
    rule: str  # the bound in words, with its key
    holds: bool


def guard_rails(found: Measurements, config: PromotionConfig) -> list[GuardRail]:
    """Every guard-rail of section `promotion`, in the order of params.yaml."""
    ours, theirs = found.candidate, found.opponent

    def at_most(name: str, meaning: str, value: float, key: str) -> GuardRail:
        bound = getattr(config, key)
        return GuardRail(name, meaning, value, f"at most {bound:g} (promotion.{key})", value <= bound)

    def at_least(name: str, meaning: str, value: float, key: str) -> GuardRail:
        bound = getattr(config, key)
        return GuardRail(name, meaning, value, f"at least {bound:g} (promotion.{key})", value >= bound)

    longest = config.max_length_ratio
    length = ratio(ours.length, theirs.length)
    return [
        at_most("kl", "nats per answer from the SFT model", found.kl, "max_kl"),
        GuardRail(
            "length_ratio",
            "mean length of answers over the opponent's",
            length,
            f"from {1 / longest:.3g} to {longest:g} (promotion.max_length_ratio)",
            1 / longest <= length <= longest,
        ),
        at_least(
            "distinct_ratio",
            "share of different word pairs over the opponent's",
            ratio(ours.distinct_2, theirs.distinct_2),
            "min_distinct_ratio",
        ),
        at_most("repeated", "share of four-word runs said before", ours.repeated_4, "max_repeated"),
        at_most(
            "perplexity_ratio",
            "perplexity on demonstrations over the SFT model's",
            ratio(found.perplexity, found.sft_perplexity),
            "max_perplexity_ratio",
        ),
        at_most(
            "refusal_rise",
            "share of answers that refuse, less the opponent's",
            ours.refusal_rate - theirs.refusal_rate,
            "max_refusal_rise",
        ),
        at_most(
            "toxic_rise",
            "share of answers with a word of abuse, less the opponent's",
            ours.toxic_rate - theirs.toxic_rate,
            "max_toxic_rise",
        ),
        at_least(
            "reward_accuracy",
            "accuracy of the reward model on held-out pairs",
            found.reward_accuracy,
            "min_reward_accuracy",
        ),
    ]


def ratio(ours: float, theirs: float) -> float:
    """ours / theirs; 1 where both are 0, without bound where only the other is."""
    if theirs == 0:
        return 1.0 if ours == 0 else math.inf
    return ours / theirs
