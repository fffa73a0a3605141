"""Section `retrain` of params.yaml: when votes are enough, what becomes of them, where PPO starts."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from rlhf_core.config.parts import Section


class RetrainConfig(Section):
    """New votes against old ones, their rules, whose labels, and where PPO starts."""

    min_votes: PositiveInt
    labels: Literal["human", "mixed", "ai"]
    start: Literal["sft", "champion"]
    new_weight: NonNegativeFloat
    old_weight: NonNegativeFloat
    base_weight: NonNegativeFloat
    half_life_days: NonNegativeFloat
    num_rows: NonNegativeInt
    consensus: Literal["majority", "dawid_skene"]
    ties: Literal["keep", "drop", "soften"]
    disputed: Literal["keep", "drop"]
    min_votes_per_item: PositiveInt
    min_held_out: NonNegativeInt
    agreement_share: float = Field(gt=0.0, le=1.0)
    license: str = Field(pattern=r"\S")
    consent: str

    @model_validator(mode="after")
    def check_weights(self) -> Self:
        if self.labels != "ai" and not (self.new_weight or self.old_weight):
            raise ValueError(
                f"retrain.new_weight ({self.new_weight}) and retrain.old_weight ({self.old_weight}) must not "
                f"both be 0 where retrain.labels is {self.labels}: no vote would count"
            )
        return self
