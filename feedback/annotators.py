"""Who votes well: accuracy on gold items, speed, position bias, and whom to leave out.

Reports are about all annotators with votes, excluded ones too: a manager looks at them before and after.
Each takes a collection and reads the last vote of an annotator on an item.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from feedback.collection import Collection
from feedback.records import Choice, Correction, Critique, Item, Ranking, Ratings, Record, Vote

MAD_TO_DEVIATION = 1.4826  # of a normal distribution


@dataclass(frozen=True)
class GoldAccuracy:
    """Share of right votes on items whose answer is known; exact interval (Clopper and Pearson 1934)."""

    annotator: str
    num_right: int
    num_gold: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Speed:
    """How long votes take. `num_fast`: votes in less time than it takes to read the texts."""

    annotator: str
    num_votes: int
    median_seconds: float
    num_fast: int
    deviations: float  # robust z-score of the log of the median among annotators; NaN below 3 of them
    outlier: bool  # far faster than the others, or too many votes faster than reading


@dataclass(frozen=True)
class PositionBias:
    """How often the answer that was shown first won, among the votes that preferred one.

    Sides are drawn at random, so without bias the count is binomial with probability 1/2.
    """

    annotator: str
    num_first: int
    num_decisive: int
    share: float
    p_value: float  # exact, two-sided
    p_adjusted: float  # of all annotators together (Holm 1979)


@dataclass(frozen=True)
class ExclusionRule:
    """Who should be looked at; leaving somebody out is a person's decision."""

    min_accuracy: float = 0.6  # on gold items: the whole interval lies below
    max_fast_share: float = 0.3  # of votes faster than reading
    significance: float = 0.01  # of position bias, adjusted


def last_votes(collection: Collection) -> dict[str, list[Vote]]:
    """By annotator, the last vote on each item."""
    last = {(vote.annotator, vote.item): vote for vote in collection.votes}
    found: dict[str, list[Vote]] = defaultdict(list)
    for (annotator, _), vote in sorted(last.items()):
        found[annotator].append(vote)
    return dict(found)


def gold_accuracy(
    collection: Collection, *, tolerance: int = 1, confidence: float = 0.95
) -> list[GoldAccuracy]:
    """Accuracy of each annotator who voted on a gold item; see `is_right` for what is right."""
    from scipy.stats import binomtest

    found = []
    for annotator, votes in last_votes(collection).items():
        judged = [
            is_right(vote.value, gold, tolerance=tolerance)
            for vote in votes
            if (gold := collection.by_id[vote.item].gold) is not None
            and not isinstance(gold, Critique | Correction)
        ]
        if not judged:
            continue
        right = sum(judged)
        interval = binomtest(right, len(judged)).proportion_ci(confidence, method="exact")
        share = right / len(judged)
        found.append(
            GoldAccuracy(annotator, right, len(judged), share, float(interval.low), float(interval.high))
        )
    return found


def is_right(value: Record, gold: Record, *, tolerance: int = 1) -> bool:
    """Whether a vote meets the known answer.

    A choice must be the same, whatever its strength; a ranking must order each pair alike; each rating may
    differ by `tolerance` points; a label must be the same. Texts are never right or wrong.
    """
    if isinstance(gold, Choice) and isinstance(value, Choice):
        return value.choice == gold.choice
    if isinstance(gold, Ratings) and isinstance(value, Ratings):
        return all(
            abs(value.ratings[name] - rating) <= tolerance
            for name, rating in gold.ratings.items()
            if name in value.ratings
        )
    if isinstance(gold, Ranking) and isinstance(value, Ranking):
        return value.ranks == gold.ranks  # without gaps, equal orders have equal ranks
    return value == gold


def reading_seconds(item: Item, characters_per_second: float) -> float:
    """The least time in which an item's answers can be read; its prompt may be known from another item."""
    return sum(len(response.text) for response in item.responses) / characters_per_second


def speed(
    collection: Collection, *, characters_per_second: float = 60.0, max_deviations: float = 3.0
) -> list[Speed]:
    """The pace of each annotator. 60 characters a second are some 600 words a minute: skimming.

    Votes of 0 seconds, as from an import that has no times, are left out.
    """
    timed = {who: [vote for vote in own if vote.seconds] for who, own in last_votes(collection).items()}
    votes = {who: own for who, own in timed.items() if own}
    medians = {who: statistics.median(vote.seconds for vote in own) for who, own in votes.items()}
    scores = _robust_scores({who: math.log(max(median, 0.001)) for who, median in medians.items()})
    found = []
    for who, own in votes.items():
        fast = sum(
            vote.seconds < reading_seconds(collection.by_id[vote.item], characters_per_second) for vote in own
        )
        outlier = scores[who] < -max_deviations or fast > len(own) * ExclusionRule.max_fast_share
        found.append(Speed(who, len(own), medians[who], fast, scores[who], outlier))
    return found


def _robust_scores(values: dict[str, float]) -> dict[str, float]:
    """Distance from the median in median absolute deviations, scaled to standard deviations."""
    if len(values) < 3:
        return dict.fromkeys(values, math.nan)
    middle = statistics.median(values.values())
    spread = statistics.median(abs(value - middle) for value in values.values())
    width = max(spread * MAD_TO_DEVIATION, 1e-3)  # equal paces are no reason to call a millisecond far
    return {who: (value - middle) / width for who, value in values.items()}


def position_bias(collection: Collection) -> list[PositionBias]:
    """For each annotator who preferred one of two answers, whether the first shown wins too often or too
    rarely.

    Votes whose sides are not known, as after an import, are left out.
    """
    from scipy.stats import binomtest

    found = []
    for annotator, votes in last_votes(collection).items():
        first = [_chose_first(vote) for vote in votes]
        known = [one for one in first if one is not None]
        if known:
            count = sum(known)
            p_value = float(binomtest(count, len(known)).pvalue)
            found.append(
                PositionBias(annotator, count, len(known), count / len(known), p_value, p_adjusted=p_value)
            )
    adjusted = holm([report.p_value for report in found])
    return [replace(report, p_adjusted=p_value) for report, p_value in zip(found, adjusted, strict=True)]


def _chose_first(vote: Vote) -> bool | None:
    if not isinstance(vote.value, Choice) or vote.value.choice not in ("a", "b") or len(vote.sides) != 2:
        return None
    return vote.sides[0] == ("a", "b").index(vote.value.choice)


def holm(p_values: Iterable[float]) -> list[float]:
    """P-values adjusted for their number, in their order (Holm 1979)."""
    given = list(p_values)
    adjusted, highest = [0.0] * len(given), 0.0
    for rank, i in enumerate(sorted(range(len(given)), key=given.__getitem__)):
        highest = max(highest, min(1.0, given[i] * (len(given) - rank)))
        adjusted[i] = highest
    return adjusted


def suggest_exclusions(collection: Collection, rule: ExclusionRule | None = None) -> dict[str, list[str]]:
    """Annotators whom the rule finds fault with, and why."""
    rule = rule or ExclusionRule()
    reasons: dict[str, list[str]] = defaultdict(list)
    for gold in gold_accuracy(collection):
        if gold.high < rule.min_accuracy:
            reasons[gold.annotator].append(
                f"{gold.num_right} of {gold.num_gold} gold items right "
                f"({gold.low:.2f} to {gold.high:.2f}), below {rule.min_accuracy}"
            )
    for pace in speed(collection):
        if pace.num_fast > pace.num_votes * rule.max_fast_share:
            reasons[pace.annotator].append(
                f"{pace.num_fast} of {pace.num_votes} votes faster than the answers can be read"
            )
    for bias in position_bias(collection):
        if bias.p_adjusted < rule.significance:
            reasons[bias.annotator].append(
                f"the answer shown first won {bias.num_first} of {bias.num_decisive} times "
                f"(p = {bias.p_adjusted:.2g})"
            )
    return dict(sorted(reasons.items()))
