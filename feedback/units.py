"""Votes as labels on units: what agreement and consensus count.

A unit is the smallest thing that annotators can agree on: the choice of a pair, each pair of a ranking, each
criterion of a rating, the label of an answer. Critiques and corrections are texts, and have no units.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Literal, NamedTuple

from feedback.collection import Collection
from feedback.records import Choice, Label, Ranking, Ratings, Record, TaskKind

Level = Literal["nominal", "ordinal", "interval"]
LabelValue = str | int


class Unit(NamedTuple):
    item: str
    part: str  # "choice", "label", a pair of responses ("0:1"), or a criterion


Labels = dict[Unit, dict[str, LabelValue]]  # by unit, then by annotator


def parts(value: Record) -> dict[str, LabelValue]:
    """The labels in one value, by part of the item."""
    if isinstance(value, Choice):
        return {"choice": value.choice}
    if isinstance(value, Label):
        return {"label": "good" if value.good else "bad"}
    if isinstance(value, Ratings):
        return dict(value.ratings)
    if isinstance(value, Ranking):
        return {f"{i}:{j}": _order(value, i, j) for i, j in combinations(range(len(value.ranks)), 2)}
    return {}


def _order(ranking: Ranking, first: int, second: int) -> str:
    difference = ranking.ranks[first] - ranking.ranks[second]
    return "tie" if difference == 0 else "a" if difference < 0 else "b"


def signed_strength(value: Record) -> int | None:
    """How much better response 0 is, -3 to 3; None where both are bad or nothing was compared."""
    if not isinstance(value, Choice) or value.choice == "bad":
        return None
    return {"a": value.strength, "b": -value.strength, "tie": 0}[value.choice]


def labels(collection: Collection) -> Labels:
    """The labels of all votes. Give `collection.counted()` to leave out those that do not count."""
    found: Labels = {}
    for vote in collection.votes:
        for part, label in parts(vote.value).items():
            found.setdefault(Unit(vote.item, part), {})[vote.annotator] = label
    return found


def strengths(collection: Collection) -> Labels:
    """The signed strengths of all choices between two answers."""
    found: Labels = {}
    for vote in collection.votes:
        strength = signed_strength(vote.value)
        if strength is not None:
            found.setdefault(Unit(vote.item, "strength"), {})[vote.annotator] = strength
    return found


def criterion(unit: Unit, kind: TaskKind) -> str:
    """What the unit is a question of; all pairs of a ranking are of one."""
    return "order" if kind is TaskKind.RANKING else unit.part


def by_criterion(collection: Collection) -> dict[str, tuple[Level, Labels]]:
    """The labels of each criterion, and the level of its scale."""
    level: Level = "ordinal" if collection.project.kind is TaskKind.RATING else "nominal"
    found: dict[str, tuple[Level, Labels]] = {}
    for unit, given in labels(collection).items():
        name = criterion(unit, collection.project.kind)
        found.setdefault(name, (level, {}))[1][unit] = given
    if graded := strengths(collection):
        found["strength"] = ("ordinal", graded)
    return dict(sorted(found.items()))


def repeated(labels: Mapping[Unit, Mapping[str, LabelValue]]) -> Labels:
    """The units that two annotators or more have labelled."""
    return {unit: dict(given) for unit, given in labels.items() if len(given) > 1}
