"""Section `collect` of params.yaml: what `rlhf collect` asks people, and how long it waits for them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from rlhf_core.config.parts import SamplingConfig, Section

MOST_SAMPLES = 9  # as many answers as an annotator has digit keys for
Choose = Literal["random", "uncertain", "disagreement", "production"]
SCORED = ("uncertain", "disagreement")  # ways of choosing that read a reward model


def _as_text(value: Any) -> Any:
    """YAML reads a version as a number."""
    return str(value) if type(value) is int else value


# An alias of the registry, the SFT model behind a version, or a version's number.
PolicyName = Annotated[
    str, BeforeValidator(_as_text), Field(pattern=r"^(champion|candidate|previous|sft|[1-9][0-9]*)$")
]


class CollectConfig(Section):
    """Which prompts, whose answers, how many votes, and until when."""

    num_prompts: PositiveInt
    held_out_share: float = Field(ge=0.0, le=1.0)
    choose: Choose
    first: PolicyName
    second: PolicyName
    samples: int = Field(ge=2, le=MOST_SAMPLES)
    oversample: float = Field(ge=1.0)
    ask_again: bool
    overlap_votes: int = Field(ge=1, le=100)
    overlap_share: float = Field(ge=0.0, le=1.0)
    gold_share: float = Field(ge=0.0, le=0.5)
    votes_wanted: NonNegativeInt
    deadline_hours: NonNegativeFloat
    watch_seconds: int = Field(ge=30)
    time_limit: PositiveInt
    sampling: SamplingConfig
    batch_size: PositiveInt

    @property
    def num_held_out(self) -> int:
        return round(self.held_out_share * self.num_prompts)

    @property
    def num_held_in(self) -> int:
        return self.num_prompts - self.num_held_out

    @model_validator(mode="after")
    def check_policies(self) -> Self:
        if self.choose == "disagreement" and self.first == self.second:
            raise ValueError(
                f"collect.choose (disagreement) needs two policies, and collect.first and collect.second are "
                f"both {self.first}"
            )
        return self

    @model_validator(mode="after")
    def check_choice(self) -> Self:
        if self.choose in SCORED and self.num_held_in == 0:
            raise ValueError(
                f"collect.held_out_share ({self.held_out_share}) leaves none of collect.num_prompts "
                f"({self.num_prompts}) for collect.choose ({self.choose}): held-out ones are drawn at random"
            )
        return self

    @model_validator(mode="after")
    def check_votes(self) -> Self:
        most = self.num_prompts * (self.overlap_votes if self.overlap_share > 0 else 1)
        if self.votes_wanted > most:
            raise ValueError(
                f"collect.votes_wanted ({self.votes_wanted}) must not exceed the {most} votes that "
                f"collect.num_prompts ({self.num_prompts}) and its overlap ask for"
            )
        return self
