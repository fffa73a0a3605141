"""One answer from many votes: majority, Dawid-Skene or the mean; and which items a person should decide.

Labels are settled for each unit of an item (feedback/units.py), ratings and strengths by their mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from feedback.collection import Collection
from feedback.records import TaskKind
from feedback.units import Labels, LabelValue, Unit, labels, parts, signed_strength, strengths

Method = Literal["majority", "dawid_skene"]
Shares = dict[LabelValue, float]  # of each label; they add up to 1


@dataclass(frozen=True)
class DisagreementRule:
    """When an item needs an adjudicator."""

    min_votes: int = 2  # an item with fewer is waiting for votes
    min_share: float = 2 / 3  # of the votes on a unit that the leading label must have
    max_rating_range: int = 2  # points between the highest and the lowest rating of a criterion
    max_strength_range: int = 4  # between the strengths -3 to 3 of a pair: 4 is "better" against "better"


@dataclass(frozen=True)
class Dispute:
    """An item for the adjudication queue."""

    item: str
    reason: str
    severity: float  # 0 to 1, the share of the votes that is against the leading label, or of the scale
    num_votes: int


def majority(given: Mapping[str, LabelValue]) -> Shares:
    """The share of each label among the votes on one unit."""
    counts = Counter(given.values())
    return {label: counts[label] / len(given) for label in sorted(counts, key=str)}


def dawid_skene(labels: Labels, *, num_iterations: int = 100) -> dict[Unit, Shares]:
    """The probability of each label on each unit (Dawid and Skene 1979), by crowd-kit's EM.

    Every annotator has a confusion matrix, learnt together with the labels, so a careless one counts less.
    The rows are sorted first, so that the same votes give the same bits in whatever order they come.
    """
    if not labels:
        return {}
    import pandas as pd
    from crowdkit.aggregation import DawidSkene

    units = sorted(labels)
    rows = [
        (number, annotator, str(label))
        for number, unit in enumerate(units)
        for annotator, label in sorted(labels[unit].items())
    ]
    names = {str(label): label for given in labels.values() for label in given.values()}
    if len(names) == 1:
        return {unit: {label: 1.0} for unit in units for label in names.values()}
    model = DawidSkene(n_iter=num_iterations)
    table = model.fit_predict_proba(pd.DataFrame(rows, columns=["task", "worker", "label"]))
    return {
        units[number]: {names[label]: float(table.at[number, label]) for label in sorted(table.columns)}
        for number in table.index
    }


def consensus(collection: Collection, method: Method = "majority") -> dict[Unit, Shares]:
    """The shares of the labels of each unit that has a vote that counts or a decision.

    A decision of an adjudicator has share 1. Dawid-Skene is for labels; ratings keep the shares of votes.
    """
    counted = collection.counted()
    given = labels(counted)
    if method == "dawid_skene" and collection.project.kind is not TaskKind.RATING:
        found = dawid_skene(given)
    else:
        found = {unit: majority(given[unit]) for unit in sorted(given)}
    for item, decision in counted.decided.items():
        for part, label in parts(decision.value).items():
            found[Unit(item, part)] = {label: 1.0}
    return dict(sorted(found.items()))


def leading(shares: Shares) -> LabelValue | None:
    """The label with the largest share, None when two share the lead."""
    most = max(shares.values())
    leaders = [label for label, share in shares.items() if share == most]
    return leaders[0] if len(leaders) == 1 else None


def mean(shares: Shares) -> float:
    """The mean of numeric labels."""
    return sum(float(label) * share for label, share in shares.items())


def mean_strength(collection: Collection, item: str) -> float:
    """How much better response 0 is, -3 to 3: the decision's strength, else the mean of the votes that count.

    Votes that found both bad say nothing about it. Give a counted collection.
    """
    if item in collection.decided:
        return float(signed_strength(collection.decided[item].value) or 0)
    found = [signed_strength(vote.value) for vote in collection.by_item.get(item, ())]
    known = [strength for strength in found if strength is not None]
    return sum(known) / len(known) if known else 0.0


def adjudication_queue(collection: Collection, rule: DisagreementRule | None = None) -> list[Dispute]:
    """The items that a person should decide, the most disputed first; those decided already are not there."""
    rule = rule or DisagreementRule()
    counted = collection.counted()
    worst: dict[str, Dispute] = {}
    for unit, given in [*labels(counted).items(), *strengths(counted).items()]:
        if unit.item in counted.decided or len(given) < rule.min_votes:
            continue
        dispute = _dispute(unit, given, collection, rule)
        if dispute and (unit.item not in worst or dispute.severity > worst[unit.item].severity):
            worst[unit.item] = dispute
    return sorted(worst.values(), key=lambda dispute: (-dispute.severity, dispute.item))


def _dispute(
    unit: Unit, given: Mapping[str, LabelValue], collection: Collection, rule: DisagreementRule
) -> Dispute | None:
    """Why the votes on a unit are too far apart, None when they are not."""
    strength = unit.part == "strength"
    if strength or collection.project.kind is TaskKind.RATING:
        most = rule.max_strength_range if strength else rule.max_rating_range
        width = 6 if strength else collection.project.scale - 1
        numbers = [int(label) for label in given.values()]
        spread = max(numbers) - min(numbers)
        # Strengths on one side of 0 differ in degree alone, which needs nobody's decision.
        if spread <= most or (strength and min(numbers) * max(numbers) >= 0):
            return None
        reason = f"{unit.part}: {min(numbers)} to {max(numbers)}, more than {most} apart"
        return Dispute(unit.item, reason, spread / width, len(given))
    shares = majority(given)
    best = max(shares.values())
    if best >= rule.min_share:
        return None
    counts = ", ".join(f"{round(share * len(given))} x {label}" for label, share in shares.items())
    return Dispute(unit.item, f"{unit.part}: {counts}", 1.0 - best, len(given))
