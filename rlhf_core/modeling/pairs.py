"""Pairs of answers as the reward model's training reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from rlhf_core.data.rows import known, read_rows
from rlhf_core.errors import InputError
from rlhf_core.modeling.encoding import encode_prompt, encode_response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Pair:
    prompt: list[int]
    chosen: list[int]  # ends with EOS
    rejected: list[int]  # ends with EOS
    margin: float  # of the labels, 0 when there is none
    group: str  # pairs of one prompt are not independent
    source: str  # "human:..." or "ai:..."
    probability: float = 1.0  # that the chosen answer is the better one
    ratings: tuple[float, float] | None = None  # of the chosen and the rejected answer, where both have one

    def __len__(self) -> int:
        """Tokens of the longer side."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


Ranking = tuple[Pair, ...]  # the pairs of one prompt


def rankings(pairs: Sequence[Pair]) -> list[Ranking]:
    """The pairs of each prompt together, in the order in which the prompts first come."""
    groups: dict[tuple[int, ...], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(tuple(pair.prompt), []).append(pair)
    return [tuple(group) for group in groups.values()]


def encode_pairs(tokenizer: PreTrainedTokenizerBase, path: Path, max_length: int) -> tuple[list[Pair], int]:
    """The pairs of `path` that fit, and how many did not. Raises InputError when none fits."""
    rows = read_rows(path)
    pairs = [encode_pair(tokenizer, row) for row in rows]
    fitting = [pair for pair in pairs if len(pair) <= max_length]
    if not fitting:
        raise InputError(
            f"{path}: none of {len(rows)} pairs fits into reward.max_length = {max_length} tokens"
        )
    return fitting, len(pairs) - len(fitting)


def encode_pair(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> Pair:
    return Pair(
        prompt=encode_prompt(tokenizer, row["messages"]),
        chosen=encode_response(tokenizer, row["chosen"]),
        rejected=encode_response(tokenizer, row["rejected"]),
        margin=known(row["margin"], 0.0),
        group=row["prompt"],
        source=row["source"],
        probability=known(row["probability"], 1.0),
        ratings=ratings_of(row),
    )


def ratings_of(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """The scores that a labeler gave to the chosen and to the rejected answer, None when it gave none."""
    ratings = known(row["chosen_score"], math.nan), known(row["rejected_score"], math.nan)
    return None if math.isnan(sum(ratings)) else ratings


@dataclass(frozen=True)
class RatingScales:
    """Mean and standard deviation of the ratings of each source: scales differ between labelers."""

    scales: dict[str, tuple[float, float]]

    @classmethod
    def of(cls, rows: Sequence[Pair]) -> RatingScales:
        ratings: dict[str, list[float]] = {}
        for row in rows:
            ratings.setdefault(row.source, []).extend(row.ratings or ())
        return cls({source: (fmean(own), max(pstdev(own), 1e-6)) for source, own in ratings.items() if own})

    def rated(self, rows: Sequence[Pair]) -> list[Pair]:
        """The rows that have ratings, on a scale of mean 0 and deviation 1 for their source."""
        return [
            replace(row, ratings=self._scaled(row.source, row.ratings))
            for row in rows
            if row.ratings is not None and row.source in self.scales
        ]

    def _scaled(self, source: str, ratings: tuple[float, float]) -> tuple[float, float]:
        mean, deviation = self.scales[source]
        return (ratings[0] - mean) / deviation, (ratings[1] - mean) / deviation
