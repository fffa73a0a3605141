"""Intervals for what a report claims. Prompts are the units: answers or pairs of one prompt move together.

Every bootstrap is seeded, so a repetition gives the same interval. Tests of significance are left out: an
interval of the paired difference says more.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CHUNK = 250  # resamples drawn at once, so memory stays small with many prompts


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its confidence interval."""

    estimate: float
    low: float
    high: float

    def as_metrics(self, name: str) -> dict[str, float]:
        """{name: estimate, name_low: ..., name_high: ...}."""
        return {name: self.estimate, f"{name}_low": self.low, f"{name}_high": self.high}


def wilson(successes: float, total: int, confidence: float) -> Interval:
    """Score interval of a proportion (Wilson 1927); it stays inside [0, 1] and is honest at 0 and 1."""
    if total <= 0 or not 0 <= successes <= total:
        raise ValueError(f"{successes} successes of {total}: need 0 <= successes <= total and total > 0")
    share = successes / total
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    # Rounding must not put a bound on the wrong side of the estimate at 0 and 1.
    return Interval(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def bootstrap_mean(values: Sequence[float], *, confidence: float, samples: int, seed: int) -> Interval:
    """Mean over prompts with its percentile bootstrap interval; one value per prompt."""
    return _bootstrap_ratio(
        np.asarray(values, dtype=np.float64), np.ones(len(values)), confidence, samples, seed
    )


def paired_difference(
    before: Sequence[float], after: Sequence[float], *, confidence: float, samples: int, seed: int
) -> Interval:
    """Mean of after - before on the same prompts, resampled by prompt."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    return bootstrap_mean(differences, confidence=confidence, samples=samples, seed=seed)


def win_rate(
    ours: Sequence[float], theirs: Sequence[float], *, confidence: float, samples: int, seed: int
) -> Interval:
    """Share of prompts where `ours` scores higher than `theirs`, a tie counting one half."""
    wins = win_rates(ours, theirs)
    interval = bootstrap_mean(wins, confidence=confidence, samples=samples, seed=seed)
    return _never_certain(interval, len(wins), confidence)


def accuracy_with_interval(
    correct: Sequence[bool],
    groups: Sequence[Hashable],
    *,
    confidence: float,
    seed: int,
    samples: int = 2000,
) -> Interval:
    """Share of pairs ordered right; pairs with the same group (prompt) are resampled together.

    Pairs of one prompt share answers, so an interval over single pairs would be too narrow.
    """
    members: dict[Hashable, list[float]] = {}
    for value, group in zip(correct, groups, strict=True):
        members.setdefault(group, []).append(float(value))
    sums = np.array([sum(values) for values in members.values()])
    counts = np.array([float(len(values)) for values in members.values()])
    interval = _bootstrap_ratio(sums, counts, confidence, samples, seed)
    return _never_certain(interval, len(members), confidence)


def length_baseline_accuracy(chosen_lengths: Sequence[int], rejected_lengths: Sequence[int]) -> float:
    """What length alone can tell: the better of "the longer was chosen" and "the shorter was chosen".

    Equal lengths count one half. Picking the better rule on the pairs it is judged by favours the baseline.
    """
    wins = win_rates(chosen_lengths, rejected_lengths)
    if not wins:
        raise ValueError("no pairs: the length baseline is undefined")
    longer = sum(wins) / len(wins)
    return max(longer, 1.0 - longer)


def brier_score(probabilities: Sequence[float]) -> float:
    """Mean of (p - 1)^2, p the probability given to the answer that was chosen (Brier 1950).

    0 is perfect, 1/4 is what a coin gets.
    """
    return float(np.mean((np.asarray(probabilities) - 1.0) ** 2))


def expected_calibration_error(probabilities: Sequence[float], bins: int = 10) -> float:
    """How far confidence and accuracy lie apart (Naeini et al. 2015), weighted over equal bins of confidence.

    `probabilities` are those given to the chosen answers: confidence is max(p, 1 - p), and right is p > 1/2.
    """
    chosen = np.asarray(probabilities)
    confidence, right = np.maximum(chosen, 1.0 - chosen), chosen > 0.5
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = [
        (which == b).sum() * abs(right[which == b].mean() - confidence[which == b].mean())
        for b in np.unique(which)
    ]
    return float(sum(gaps) / len(chosen))


def win_rates(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """By prompt: 1 where ours scores higher, 1/2 for a tie, else 0. Their mean is the win rate."""
    return [0.5 if a == b else float(a > b) for a, b in zip(ours, theirs, strict=True)]


def _never_certain(interval: Interval, units: int, confidence: float) -> Interval:
    """Resampling only wins (or only losses) gives an interval of width 0; there Wilson's is used."""
    if interval.estimate in (0.0, 1.0):
        return wilson(interval.estimate * units, units, confidence)
    return interval


def _bootstrap_ratio(
    sums: np.ndarray, counts: np.ndarray, confidence: float, samples: int, seed: int
) -> Interval:
    """sum(sums) / sum(counts) over resampled units; both (G,), G units."""
    if len(sums) == 0:
        raise ValueError("no values: an interval is undefined")
    rng = np.random.default_rng(seed)
    estimates = []
    for start in range(0, samples, CHUNK):
        picks = rng.integers(0, len(sums), size=(min(CHUNK, samples - start), len(sums)))
        estimates.append(sums[picks].sum(axis=1) / counts[picks].sum(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(estimates), [tail, 1 - tail])
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high))
