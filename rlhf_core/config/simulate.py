"""Section `simulate` of params.yaml: the people that `rlhf simulate` puts in the place of people."""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rlhf_core.config.parts import Section


class SimulateConfig(Section):
    """How many there are, and how they err. What they like is `evaluate.gold`."""

    annotators: PositiveInt
    noise: NonNegativeFloat
    position_bias: float = Field(ge=0.0, le=1.0)
    tie_gap: NonNegativeFloat
    characters_per_second: PositiveFloat
    seconds: NonNegativeFloat
    seed: NonNegativeInt
    first_updates: PositiveInt
