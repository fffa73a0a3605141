"""Rows of several data sets as one, by weight and age: an old set and what was collected since.

The reward model's training knows no weight of a row, so weights become chances: each row draws a number from
a hash of the seed and its content, and no clock and no order of the sources is in the result. A row's number
does not depend on the other rows, so a set that grows keeps most of its sample.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from feedback.rows import canonical

Row = dict[str, Any]
DAY = 86_400.0  # seconds


@dataclass(frozen=True)
class Source:
    """A data set in a merge. `at` is the age of its rows that have no `at` of their own."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    weight: float = 1.0
    at: datetime | None = None

    def __post_init__(self) -> None:
        if not (self.weight >= 0.0 and math.isfinite(self.weight)):
            raise ValueError(f"source {self.name}: weight ({self.weight}) must be a number from 0 up")


@dataclass
class Merged:
    """The rows kept, each with `weight` and `origin`; and per source what became of its rows."""

    rows: list[Row] = field(default_factory=list)
    kept: dict[str, int] = field(default_factory=dict)
    superseded: dict[str, int] = field(default_factory=dict)  # a newer row judges the same answers
    not_drawn: dict[str, int] = field(default_factory=dict)


def merge(
    sources: Sequence[Source],
    *,
    now: datetime,
    half_life_days: float | None,
    num_rows: int | None = None,
    seed: int = 0,
) -> Merged:
    """Merge preference rows: weight = weight of the source * 2^(-age / half-life), None for no ageing.

    Of rows that judge the same two answers to one prompt, whichever was chosen, the newest stays. With
    `num_rows` so many are drawn without replacement, by weight (Efraimidis and Spirakis 2006); without it a
    row is kept with its weight as the chance, at most 1. Rows of weight 0 never are.

    Raises ValueError for a bad number, sources of one name, and a row without a text or a time.
    """
    if half_life_days is not None and not half_life_days > 0.0:
        raise ValueError(f"half_life_days ({half_life_days}) must be above 0, or None for no ageing")
    if num_rows is not None and num_rows < 1:
        raise ValueError(f"num_rows ({num_rows}) must be at least 1, or None for the weights as chances")
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"sources {names} must have different names")
    none = dict.fromkeys(sorted(names), 0)
    merged = Merged([], none.copy(), none.copy(), none.copy())
    rows = _newest(sources, now, half_life_days, merged)
    drawn = _draw(rows, num_rows, seed)
    for row in rows:
        counts = merged.kept if canonical(row) in drawn else merged.not_drawn
        counts[row["origin"]] += 1
    merged.rows = [row for row in rows if canonical(row) in drawn]
    return merged


def _newest(
    sources: Sequence[Source], now: datetime, half_life_days: float | None, merged: Merged
) -> list[Row]:
    """One row for each two answers to a prompt, with its weight, in an order by content."""
    newest: dict[str, tuple[datetime, str, Row]] = {}
    for source in sources:
        for number, row in enumerate(source.rows, start=1):
            at = _time(row, source, number)
            age = max(0.0, (now - at).total_seconds()) / DAY
            decay = 1.0 if half_life_days is None else 0.5 ** (age / half_life_days)
            own = dict(row) | {"weight": source.weight * decay, "origin": source.name}
            key, found = _pair(own, source, number), (at, canonical(own), own)
            if key in newest:
                lost = min(found, newest[key], key=lambda one: one[:2])
                merged.superseded[lost[2]["origin"]] += 1
                found = max(found, newest[key], key=lambda one: one[:2])
            newest[key] = found
    return [newest[key][2] for key in sorted(newest)]


def _time(row: Mapping[str, Any], source: Source, number: int) -> datetime:
    at = source.at
    if row.get("at") is not None:
        try:
            at = datetime.fromisoformat(row["at"])
        except (TypeError, ValueError):
            rule = "must be a time in ISO 8601"
            raise ValueError(f"source {source.name}: row {number}: at: {row['at']!r}; {rule}") from None
    if at is None:
        raise ValueError(f"source {source.name}: row {number}: at: is missing, and the source has no time")
    if at.tzinfo is None:
        raise ValueError(f"source {source.name}: row {number}: at: {at} must have an offset from UTC")
    return at.astimezone(UTC)


def _pair(row: Row, source: Source, number: int) -> str:
    """What a row judges: the prompt and its two answers, in no order."""
    for name in ("prompt", "chosen", "rejected"):
        if row.get(name) is None:
            raise ValueError(f"source {source.name}: row {number}: {name}: is missing")
    prompt = row.get("messages") or row["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return _digest(canonical([prompt, sorted((row["chosen"], row["rejected"]), key=canonical)]))


def _draw(rows: Sequence[Row], num_rows: int | None, seed: int) -> set[str]:
    """The texts of the rows that are kept."""
    weighted = [row for row in rows if row["weight"] > 0.0]
    if num_rows is None:
        return {canonical(row) for row in weighted if _uniform(row, seed) < row["weight"]}
    # The largest u^(1/w), in logarithms.
    ordered = sorted(weighted, key=lambda row: math.log(_uniform(row, seed)) / row["weight"], reverse=True)
    return {canonical(row) for row in ordered[:num_rows]}


def _uniform(row: Row, seed: int) -> float:
    """A number above 0 and at most 1, from the seed and what the row judges; not from its weight."""
    text = canonical([row.get("messages") or row["prompt"], row["chosen"], row["rejected"]])
    return (int(_digest(f"{seed}\0{text}")[:13], 16) + 1) / 16**13


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
