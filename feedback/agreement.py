"""How far annotators agree beyond chance: Krippendorff's alpha, Cohen's kappa, and what disagreement costs.

The package `krippendorff` computes the same alpha but is under the GPL, so it is a tool of the tests here and
no dependency.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feedback.collection import Collection
from feedback.units import Labels, LabelValue, Level, by_criterion, repeated

Floats = NDArray[np.float64]
SCALES = {"nominal": None, "ordinal": "linear", "interval": "quadratic"}  # weights of Cohen's kappa


@dataclass(frozen=True)
class Agreement:
    """Alpha on the units with two labels or more; NaN where it is not defined."""

    criterion: str
    level: Level
    alpha: float
    low: float
    high: float
    num_units: int
    num_labels: int


@dataclass(frozen=True)
class Kappa:
    """Cohen's kappa of two annotators on the units that both have labelled."""

    first: str
    second: str
    criterion: str
    kappa: float  # NaN where both gave one and the same label only
    observed: float  # share of equal labels
    num_units: int


@dataclass(frozen=True)
class DisagreementCost:
    """What disagreement on one criterion cost."""

    criterion: str
    num_units: int  # with two labels or more
    num_disputed: int  # with labels that differ
    disagreement: float  # mean squared distance of two labels of a unit, 0 to 1 on the scale's full length
    extra_votes: int  # votes beyond the first on items with disputed units
    extra_seconds: float  # time of those votes, at the mean of the item's votes
    num_decisions: int  # items with disputed units that an adjudicator decided


def krippendorff_alpha(units: Iterable[Sequence[LabelValue]], level: Level) -> float:
    """Alpha = 1 - D_o / D_e (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability").

    `units`: the labels of each unit; those with fewer than two do not count. NaN where nothing can be paired
    or all labels are equal, since no disagreement can be expected then.
    """
    values, coincidences = _coincidences(units)
    return _alpha(coincidences.sum(axis=0), values, level) if len(values) else math.nan


def _coincidences(units: Iterable[Sequence[LabelValue]]) -> tuple[list[LabelValue], Floats]:
    """The values in order, V, and each unit's share of the coincidence matrix, (U, V, V)."""
    pairable = [unit for unit in units if len(unit) > 1]
    values = sorted(
        {label for unit in pairable for label in unit}, key=lambda label: (str(type(label)), label)
    )
    index = {value: i for i, value in enumerate(values)}
    counts = np.zeros((len(pairable), len(values)))
    for row, unit in enumerate(pairable):
        for label in unit:
            counts[row, index[label]] += 1.0
    pairs = counts[:, :, None] * counts[:, None, :]
    diagonal = np.arange(len(values))
    pairs[:, diagonal, diagonal] -= counts
    return values, pairs / np.maximum(counts.sum(axis=1) - 1.0, 1.0)[:, None, None]


def _alpha(coincidences: Floats, values: Sequence[LabelValue], level: Level) -> float:
    """Alpha of one coincidence matrix, (V, V)."""
    marginals = coincidences.sum(axis=1)  # (V,)
    distances = _distances(values, marginals, level)
    total = marginals.sum()
    expected = float((np.outer(marginals, marginals) * distances).sum())
    if expected == 0.0:
        return math.nan
    return 1.0 - (total - 1.0) * float((coincidences * distances).sum()) / expected


def _distances(values: Sequence[LabelValue], marginals: Floats, level: Level) -> Floats:
    """Squared distances of values, (V, V): `values` ascend, `marginals` count how often each stands."""
    if level == "nominal":
        return 1.0 - np.eye(len(values))
    if level == "ordinal":
        middle = np.cumsum(marginals) - marginals / 2.0  # the mean rank of each value
        return (middle[:, None] - middle[None, :]) ** 2
    numbers = np.array([float(value) for value in values])
    return (numbers[:, None] - numbers[None, :]) ** 2


def alpha_interval(
    units: Iterable[Sequence[LabelValue]],
    level: Level,
    *,
    confidence: float = 0.95,
    num_samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap of alpha over units; NaN where alpha is.

    Samples in which alpha is not defined are left out.
    """
    values, coincidences = _coincidences(units)
    if not len(values) or math.isnan(_alpha(coincidences.sum(axis=0), values, level)):
        return math.nan, math.nan
    rng, size = np.random.default_rng(seed), len(coincidences)
    found = []
    for _ in range(num_samples):
        times = np.bincount(rng.integers(0, size, size), minlength=size).astype(float)
        found.append(_alpha(np.tensordot(times, coincidences, axes=1), values, level))
    defined = [alpha for alpha in found if not math.isnan(alpha)]
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(defined, [tail, 100.0 - tail])
    return float(low), float(high)


def agreement(collection: Collection, *, num_samples: int = 1000, seed: int = 0) -> list[Agreement]:
    """Alpha with its interval for each criterion, on the votes that count."""
    found = []
    for name, (level, labels) in by_criterion(collection.counted()).items():
        units = [list(given.values()) for given in repeated(labels).values()]
        low, high = alpha_interval(units, level, num_samples=num_samples, seed=seed)
        count = sum(map(len, units))
        found.append(Agreement(name, level, krippendorff_alpha(units, level), low, high, len(units), count))
    return found


def pairwise_kappa(collection: Collection, *, min_units: int = 2) -> list[Kappa]:
    """Cohen's kappa of every two annotators with `min_units` units in common, by criterion.

    Ordinal scales are weighted by the distance of ranks (scikit-learn's `linear`).
    """
    return [
        found
        for name, (level, labels) in by_criterion(collection.counted()).items()
        for first, second in combinations(sorted({who for given in labels.values() for who in given}), 2)
        if (found := _kappa(first, second, name, level, labels)).num_units >= min_units
    ]


def _kappa(first: str, second: str, criterion: str, level: Level, labels: Labels) -> Kappa:
    common = [
        (given[first], given[second]) for given in labels.values() if first in given and second in given
    ]
    equal = sum(one == other for one, other in common)
    observed = equal / len(common) if common else math.nan
    kappa = cohen_kappa(common, level)
    return Kappa(first, second, criterion, kappa, observed, len(common))


def cohen_kappa(pairs: Sequence[tuple[LabelValue, LabelValue]], level: Level = "nominal") -> float:
    """Cohen's kappa of two columns of labels, by scikit-learn; NaN where only one label was given."""
    values: list[Any] = sorted({label for pair in pairs for label in pair})
    if len(values) < 2:
        return math.nan
    if level != "nominal":
        values = list(range(int(values[0]), int(values[-1]) + 1))  # distances are those of the whole scale
    from sklearn.metrics import cohen_kappa_score

    return float(cohen_kappa_score(*zip(*pairs), labels=values, weights=SCALES[level]))


def disagreement_costs(collection: Collection) -> list[DisagreementCost]:
    """What disagreement cost, by criterion: units disputed, votes and seconds spent on them, decisions."""
    counted = collection.counted()
    seconds = {
        item: sum(vote.seconds for vote in votes) / len(votes) for item, votes in counted.by_item.items()
    }
    found = []
    for name, (level, labels) in by_criterion(counted).items():
        units = repeated(labels)
        disputed = {unit: given for unit, given in units.items() if len(set(given.values())) > 1}
        extra = {
            unit.item: len(given) - 1 for unit, given in disputed.items()
        }  # once for all parts of an item
        found.append(
            DisagreementCost(
                criterion=name,
                num_units=len(units),
                num_disputed=len(disputed),
                disagreement=_mean_distance(units, level, _width(collection, name)),
                extra_votes=sum(extra.values()),
                extra_seconds=sum(number * seconds[item] for item, number in extra.items()),
                num_decisions=sum(item in counted.decided for item in extra),
            )
        )
    return found


def _width(collection: Collection, criterion: str) -> float:
    """The longest distance on a criterion's scale."""
    return 6.0 if criterion == "strength" else float(collection.project.scale - 1)


def _mean_distance(units: Labels, level: Level, width: float) -> float:
    """Over units, the mean squared distance of two labels; NaN without units."""
    means = []
    for given in units.values():
        pairs = list(combinations(given.values(), 2))
        if level == "nominal":
            distances = [float(one != other) for one, other in pairs]
        else:
            distances = [((float(one) - float(other)) / width) ** 2 for one, other in pairs]
        means.append(sum(distances) / len(distances))
    return sum(means) / len(means) if means else math.nan
