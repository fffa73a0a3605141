"""How far an AI labeler agrees with people: both compare the same answers, and are compared.

A labeler gives one number per answer, people speak of pairs, rankings, ratings and labels; what they have in
common is which of two answers to one prompt is better. People's side is the consensus.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from feedback.agreement import cohen_kappa
from feedback.collection import Collection
from feedback.consensus import Shares, consensus, leading, mean
from feedback.records import Item, TaskKind
from feedback.rows import TIE, group_of
from feedback.units import Unit, criterion

ALL = "all"


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt, and which one people prefer on one criterion."""

    project: str
    criterion: str
    group: str  # the same for all comparisons on one prompt, which are not independent
    prompt: str
    first: str
    second: str
    people: str  # a (the first), b or tie


@dataclass(frozen=True)
class Agreement:
    """A labeler against people on one criterion."""

    project: str
    criterion: str
    num: int
    observed: float  # share of equal labels
    kappa: float  # Cohen's; NaN where all labels are one
    equal: tuple[bool, ...]  # by comparison
    groups: tuple[str, ...]


def comparisons(collection: Collection, share: float = 1.0, seed: int = 0) -> list[Comparison]:
    """What people settled, on a `share` of the prompts, drawn by hash. Both-bad and gold items are left out.

    Chats, critiques and corrections compare nothing.
    """
    counted = collection.counted()
    shares = {
        unit: found for unit, found in consensus(counted).items() if counted.by_id[unit.item].gold is None
    }
    kind = counted.project.kind
    if kind in (TaskKind.PAIRWISE, TaskKind.RANKING):
        found = _compared(counted, shares)
    elif kind in (TaskKind.RATING, TaskKind.LABEL):
        found = _graded(counted, shares)
    else:
        return []
    return [one for one in found if _drawn(one.group, share, seed)]


def _drawn(group: str, share: float, seed: int) -> bool:
    digest = hashlib.sha256(f"{seed}\0{group}".encode()).hexdigest()
    return int(digest[:13], 16) / 16**13 < share


def _compared(counted: Collection, shares: dict[Unit, Shares]) -> Iterator[Comparison]:
    for unit, found in sorted(shares.items()):
        label = str(leading(found))
        if label == "bad":
            continue
        item = counted.by_id[unit.item]
        first, second = map(int, unit.part.split(":")) if ":" in unit.part else (0, 1)
        texts = item.responses[first].text, item.responses[second].text
        yield _comparison(item, criterion(unit, item.kind), texts, label)


def _graded(counted: Collection, shares: dict[Unit, Shares]) -> Iterator[Comparison]:
    """Every two answers to one prompt, by criterion: the one with the higher grade is preferred."""
    graded: dict[tuple[str, str], list[tuple[float, Item]]] = {}
    for unit, found in sorted(shares.items()):
        item = counted.by_id[unit.item]
        good = found.get("good", 0.0) > TIE
        score = float(good) if item.kind is TaskKind.LABEL else mean(found)
        graded.setdefault((group_of(item), criterion(unit, item.kind)), []).append((score, item))
    for (_, name), answers in sorted(graded.items()):
        for (ours, first), (theirs, second) in combinations(answers, 2):
            label = "tie" if math.isclose(ours, theirs) else "a" if ours > theirs else "b"
            yield _comparison(first, name, (first.responses[0].text, second.responses[0].text), label)


def _comparison(item: Item, name: str, texts: tuple[str, str], label: str) -> Comparison:
    people = label if label in ("a", "b") else "tie"
    return Comparison(item.project, name, group_of(item), item.prompt, *texts, people)


def label_of(first: float, second: float, min_margin: float) -> str:
    """What a labeler says whose scores of two answers are these; closer than `min_margin` is a tie."""
    gap = first - second
    if gap == 0.0 or abs(gap) < min_margin:
        return "tie"
    return "a" if gap > 0.0 else "b"


def agreements(found: Sequence[Comparison], labels: Sequence[str]) -> list[Agreement]:
    """By project and criterion, and by criterion over `ALL` projects where one has several.

    `labels` are the labeler's, in the order of the comparisons.
    """
    by_name: dict[tuple[str, str], list[tuple[Comparison, str]]] = {}
    projects: dict[str, set[str]] = {}
    for comparison in found:
        projects.setdefault(comparison.criterion, set()).add(comparison.project)
    for comparison, label in zip(found, labels, strict=True):
        several = [ALL] if len(projects[comparison.criterion]) > 1 else []
        for project in [comparison.project, *several]:
            by_name.setdefault((project, comparison.criterion), []).append((comparison, label))
    return [_agreement(project, name, rows) for (project, name), rows in sorted(by_name.items())]


def _agreement(project: str, name: str, rows: Sequence[tuple[Comparison, str]]) -> Agreement:
    pairs = [(comparison.people, label) for comparison, label in rows]
    equal = tuple(people == label for people, label in pairs)
    return Agreement(
        project=project,
        criterion=name,
        num=len(rows),
        observed=sum(equal) / len(equal),
        kappa=cohen_kappa(pairs),
        equal=equal,
        groups=tuple(comparison.group for comparison, _ in rows),
    )
