"""Which of the answered prompts are asked: where a vote tells most.

Scores come from the members of a reward model, an ensemble or a single one. Pure functions of numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, pvariance

Scores = Sequence[Sequence[float]]  # what each member says of each answer to one prompt: (members, answers)


@dataclass(frozen=True)
class Chosen:
    """Places of the prompts that are asked, and what they were chosen by."""

    places: list[int]
    values: list[float]  # of each of them
    how: str


def member_variance(scores: Scores) -> float:
    """How far the members differ about which answer is better, and by how much.

        u = mean over pairs of answers i < j of Var_m(r_m(i) - r_m(j))

    with the variance over the members m (divided by their number). What one member gives to all answers more
    than another cancels. Gleave & Irving 2022 take the variance of preferences of an ensemble likewise.
    """
    pairs = combinations(range(len(scores[0])), 2)
    return fmean(pvariance([own[i] - own[j] for own in scores]) for i, j in pairs)


def mean_gap(scores: Scores) -> float:
    """g = mean over pairs of answers i < j of |r(i) - r(j)|, r being the mean over the members."""
    mean = means(scores)
    return fmean(abs(a - b) for a, b in combinations(mean, 2))


def side_gap(scores: Scores, is_first: Sequence[bool]) -> float:
    """d = |mean r of the first policy's answers - mean r of the second's|, r being the mean over members."""
    mean = means(scores)
    first = [score for score, own in zip(mean, is_first, strict=True) if own]
    second = [score for score, own in zip(mean, is_first, strict=True) if not own]
    return abs(fmean(first) - fmean(second))


def means(scores: Scores) -> list[float]:
    """By answer, over the members."""
    return [fmean(column) for column in zip(*scores, strict=True)]


def choose_uncertain(scores: Sequence[Scores], count: int) -> Chosen:
    """The `count` prompts of most doubt: most `member_variance`, or of one model the least `mean_gap`."""
    if scores and len(scores[0]) > 1:
        how = f"most variance between the {len(scores[0])} members of the reward model's ensemble"
        return _highest(scores, member_variance, count, how)
    found = _highest(scores, lambda own: -mean_gap(own), count, "least gap of scores of one reward model")
    return Chosen(found.places, [-value for value in found.values], found.how)


def choose_disagreement(scores: Sequence[Scores], is_first: Sequence[bool], count: int) -> Chosen:
    """The `count` prompts with most `side_gap`; `is_first` says which answers are the first policy's."""
    how = "most gap of scores between the two policies"
    return _highest(scores, lambda own: side_gap(own, is_first), count, how)


def choose_drawn(available: int, count: int) -> Chosen:
    """The first ones of an order that was drawn already."""
    places = list(range(min(available, count)))
    return Chosen(places, [0.0] * len(places), "drawn at random")


def _highest(scores: Sequence[Scores], measure: Callable[[Scores], float], count: int, how: str) -> Chosen:
    """Equal ones stay in the order given."""
    values = [measure(own) for own in scores]
    places = sorted(range(len(values)), key=lambda i: -values[i])[:count]
    return Chosen(places, [values[i] for i in places], how)
