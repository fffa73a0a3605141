"""What a manager sees of a project: how far it is, who does what how well, where people disagree."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from feedback.agreement import Kappa, agreement, disagreement_costs, pairwise_kappa
from feedback.annotators import gold_accuracy, position_bias, speed, suggest_exclusions
from feedback.collection import Collection
from feedback.consensus import adjudication_queue
from feedback.gathering import gather, queue_state
from feedback.store import Store
from feedback.web import plots

HOURS = 48
AGREEMENT_SAMPLES = 200  # of the bootstrap: the page is drawn again every few seconds


@dataclass(frozen=True)
class PersonRow:
    """One annotator's line; None where too little is known."""

    name: str
    id: str
    excluded: bool
    num_votes: int
    median_seconds: float | None
    accuracy: str
    first_share: str
    warnings: tuple[str, ...]


def dashboard(store: Store, project_id: str) -> dict[str, Any]:
    """The values of the dashboard's template. Raises InputError for an unknown project."""
    collection = gather(store, project_id)
    names = {person.id: person.name for person in collection.annotators}
    accuracies = gold_accuracy(collection)
    found = [row for row in agreement(collection, num_samples=AGREEMENT_SAMPLES) if not math.isnan(row.alpha)]
    return {
        "project": collection.project,
        "state": queue_state(store, project_id),
        "num_disputed": len(adjudication_queue(collection)),
        "num_decided": len(collection.decided),
        "people": _people(collection, names),
        "agreements": found,
        "costs": [cost for cost in disagreement_costs(collection) if cost.num_units],
        "votes_plot": _votes_plot(store, collection),
        "accuracy_plot": plots.shares(
            [(names[row.annotator], row.accuracy, row.low, row.high) for row in accuracies],
            "Share of right votes on gold items, with 95 % intervals",
        )
        if accuracies
        else None,
        "bias_plot": _bias_plot(collection, names),
    }


def kappas(collection: Collection) -> list[Kappa]:
    """Of each two annotators with votes on the same items, the lowest first; those not defined last."""
    found = pairwise_kappa(collection)
    return sorted(found, key=lambda row: (math.isnan(row.kappa), row.kappa, row.first, row.second))


def _people(collection: Collection, names: dict[str, str]) -> list[PersonRow]:
    right = {row.annotator: f"{row.num_right} of {row.num_gold}" for row in gold_accuracy(collection)}
    bias = {row.annotator: row for row in position_bias(collection)}
    warnings = suggest_exclusions(collection)
    excluded = {person.id for person in collection.annotators if person.excluded}
    rows = []
    for row in speed(collection):
        who = row.annotator
        first = f"{bias[who].share:.0%} of {bias[who].num_decisive}" if who in bias else ""
        rows.append(
            PersonRow(
                names[who],
                who,
                who in excluded,
                row.num_votes,
                row.median_seconds,
                right.get(who, ""),
                first,
                tuple(warnings.get(who, ())),
            )
        )
    return sorted(rows, key=lambda person: (-person.num_votes, person.name))


def _votes_plot(store: Store, collection: Collection):
    """Votes in each of the last hours."""
    end = store.clock().replace(minute=0, second=0, microsecond=0)
    counted = Counter(
        int((end - vote.at.replace(minute=0, second=0, microsecond=0)).total_seconds() // 3600)
        for vote in collection.votes
    )
    ages = range(HOURS - 1, -1, -1)
    labels = [(end - timedelta(hours=age)).strftime("%d %b %H:00") for age in ages]
    return plots.bars([counted[age] for age in ages], labels, f"Votes by hour, last {HOURS} hours (UTC)")


def _bias_plot(collection: Collection, names: dict[str, str]):
    from scipy.stats import (
        binomtest,
    )  # takes half a second to load, which a start of the service need not wait

    rows = []
    for row in position_bias(collection):
        interval = binomtest(row.num_first, row.num_decisive).proportion_ci(0.95, method="exact")
        rows.append((names[row.annotator], row.share, float(interval.low), float(interval.high)))
    title = "Share of preferences for the answer that was shown first, with 95 % intervals; 0.5 is no bias"
    return plots.shares(rows, title, mark=0.5) if rows else None
