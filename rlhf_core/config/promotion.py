"""Section `promotion` of params.yaml: when a candidate may become the champion."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rlhf_core.config.parts import SamplingConfig, Section, check_target


class PromotionConfig(Section):
    """The judge, the statistics of the gate, the bounds of the guard-rails, and who says yes."""

    approval: Literal["person", "auto"]
    judge: Literal["vader", "judge", "endpoint", "function", "reward_model"]
    judge_target: str
    compare: Literal["scores", "pairs"]
    num_prompts: PositiveInt
    samples_per_prompt: PositiveInt
    min_comparisons: PositiveInt
    margin: float = Field(ge=0.0, lt=0.5)
    confidence: float = Field(gt=0.5, lt=1.0)
    max_kl: PositiveFloat
    max_length_ratio: float = Field(ge=1.0)
    min_distinct_ratio: float = Field(ge=0.0)
    max_repeated: float = Field(ge=0.0, le=1.0)
    max_perplexity_ratio: PositiveFloat
    max_refusal_rise: float = Field(ge=0.0, le=1.0)
    max_toxic_rise: float = Field(ge=0.0, le=1.0)
    min_reward_accuracy: float = Field(ge=0.0, le=1.0)
    num_demonstrations: PositiveInt
    num_samples: PositiveInt
    time_limit: PositiveInt
    sampling: SamplingConfig
    batch_size: PositiveInt

    @model_validator(mode="after")
    def check_judge(self) -> Self:
        if self.judge == "reward_model":
            if not re.fullmatch(r"[0-9]*", self.judge_target):
                raise ValueError(
                    f"promotion.judge_target ({self.judge_target!r}) must be a version of the registered "
                    "reward model, or empty for the candidate's own, when promotion.judge is reward_model"
                )
        else:
            check_target("promotion.judge", self.judge, self.judge_target)
        if self.compare == "pairs" and self.judge not in ("judge", "function"):
            raise ValueError(
                f"promotion.compare (pairs) needs promotion.judge judge or function, not {self.judge}, which "
                "gives scores only"
            )
        return self

    @model_validator(mode="after")
    def check_prompts(self) -> Self:
        if self.min_comparisons > self.num_prompts:
            raise ValueError(
                f"promotion.min_comparisons ({self.min_comparisons}) must not exceed promotion.num_prompts "
                f"({self.num_prompts}): a prompt is one comparison"
            )
        return self
