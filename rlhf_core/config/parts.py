"""What several sections of params.yaml are made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class SamplingConfig(Section):
    """How text is made. A seed makes it repeatable; 0 and 1 switch top-k and top-p off."""

    temperature: PositiveFloat
    top_k: NonNegativeInt
    top_p: float = Field(gt=0.0, le=1.0)
    max_new_tokens: PositiveInt
    seed: NonNegativeInt


def check_target(key: str, kind: str, target: str) -> None:
    if kind == "vader" and target:
        raise ValueError(f"{key}_target ({target!r}) must be empty when {key} is vader")
    if kind != "vader" and not target:
        raise ValueError(f"{key}_target must say which one when {key} is {kind}")
    if kind == "function" and target.count(":") != 1:
        raise ValueError(f"{key}_target ({target!r}) must have the form module:function")
