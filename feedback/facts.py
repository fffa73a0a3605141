"""What there is to say of a collection: counts, time span, agreement, annotators by pseudonym."""

from __future__ import annotations

import hashlib
import math
from typing import Any

from feedback.agreement import agreement, disagreement_costs, pairwise_kappa
from feedback.annotators import gold_accuracy, last_votes, position_bias
from feedback.collection import Collection
from feedback.consensus import adjudication_queue
from feedback.rows import pseudonym, utc


def describe(counted: Collection, key: str, *, num_samples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Facts about the votes that count, as plain values; numbers that are not defined are None.

    Give `collection.counted()`. Nothing depends on the order of the records, or on annotators without votes.
    """
    return {
        "project": {
            "id": counted.project.id,
            "name": counted.project.name,
            "kind": str(counted.project.kind),
            "criteria": list(counted.project.criteria),
            "guidelines_sha256": hashlib.sha256(counted.project.guidelines.encode()).hexdigest(),
        },
        "counts": {
            "items": len(counted.items),
            "items_with_votes": len(counted.by_item),
            "gold_items": sum(item.gold is not None for item in counted.items),
            "votes": len(counted.votes),
            "decisions": len(counted.decided),
            "waiting_for_adjudication": len(adjudication_queue(counted)),
        },
        "time_span": _time_span(counted),
        "agreement": _agreement(counted, num_samples, seed),
        "annotators": _annotators(counted, key),
    }


def _time_span(counted: Collection) -> list[str]:
    times = [vote.at for vote in counted.votes] + [decision.at for decision in counted.decisions]
    return [utc(min(times)), utc(max(times))] if times else []


def _agreement(counted: Collection, num_samples: int, seed: int) -> list[dict[str, Any]]:
    costs = {cost.criterion: cost for cost in disagreement_costs(counted)}
    kappas: dict[str, list[float]] = {}
    for one in pairwise_kappa(counted):
        if not math.isnan(one.kappa):
            kappas.setdefault(one.criterion, []).append(one.kappa)
    found = []
    for report in agreement(counted, num_samples=num_samples, seed=seed):
        own, cost = kappas.get(report.criterion, []), costs[report.criterion]
        found.append(
            {
                "criterion": report.criterion,
                "level": report.level,
                "alpha": rounded(report.alpha),
                "alpha_interval": [rounded(report.low), rounded(report.high)],
                "units": report.num_units,
                "mean_kappa": rounded(sum(own) / len(own)) if own else None,
                "kappa_pairs": len(own),
                "disputed_units": cost.num_disputed,
                "extra_votes": cost.extra_votes,
                "extra_seconds": rounded(cost.extra_seconds),
                "decisions": cost.num_decisions,
            }
        )
    return found


def _annotators(counted: Collection, key: str) -> list[dict[str, Any]]:
    gold = {report.annotator: report for report in gold_accuracy(counted)}
    bias = {report.annotator: report for report in position_bias(counted)}
    found = []
    for annotator, votes in last_votes(counted).items():
        right, side = gold.get(annotator), bias.get(annotator)
        found.append(
            {
                "annotator": pseudonym(annotator, key),
                "votes": len(votes),
                "gold_accuracy": rounded(right.accuracy) if right else None,
                "gold_interval": [rounded(right.low), rounded(right.high)] if right else None,
                "first_share": rounded(side.share) if side else None,
                "first_p_value": rounded(side.p_adjusted) if side else None,
            }
        )
    return sorted(found, key=lambda one: str(one["annotator"]))


def rounded(number: float) -> float | None:
    """To 4 digits, so that the last bits of a sum do not show; None for NaN."""
    return None if math.isnan(number) else round(number, 4)
