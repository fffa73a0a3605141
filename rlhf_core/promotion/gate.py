"""The statistics of the gate: pure, seedless, exact where it can be. The unit is the prompt.

Each prompt gives one number in [0, 1], the candidate's share of its comparisons (a win 1, a tie 1/2, both
orders and all samples together): comparisons of one prompt move together, so only prompts are independent.

A candidate passes when all three hold:

1. there are at least `min_comparisons` prompts;
2. the one-sided lower bound of the win rate exceeds 0.5 + margin;
3. a randomisation test rejects "the two are the same" at the same level. Two policies that are the same
   can change places, so then every prompt's number is as likely as its mirror image about 1/2, and the
   chance of 3 is at most 1 - confidence for any number of prompts and any share of ties: a theorem, where 2
   alone is an approximation.

Sequential looks are left out: each promotion of the same candidate is a new chance to pass.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

WIN, TIE, LOSS = 1.0, 0.5, 0.0


@dataclass(frozen=True)
class GateResult:
    """What the comparisons say, and whether that is enough."""

    num_prompts: int
    win_rate: float
    low: float  # one-sided lower bound of the win rate
    high: float  # one-sided upper bound, for the reader
    p_value: float  # of "the two policies are the same"
    required: float  # what `low` must exceed
    ties: float  # share of prompts that stand exactly at 1/2
    reasons: tuple[str, ...]  # why it does not pass; empty when it does

    @property
    def passes(self) -> bool:
        return not self.reasons


def judge_outcomes(
    outcomes: Sequence[Sequence[float]], *, margin: float, confidence: float, min_comparisons: int
) -> GateResult:
    """The gate's decision on `outcomes`: by prompt, each comparison's 1 (the candidate won), 1/2 or 0.

    Raises ValueError when a prompt has no or more comparisons than another, or another number than these.
    """
    points = half_points(outcomes)
    size = 2 * len(outcomes[0])
    shares = [point / size for point in points]
    low, high = score_bounds(shares, confidence)
    p_value = exchange_p_value([2 * point - size for point in points])
    required, alpha = 0.5 + margin, 1.0 - confidence
    reasons = []
    if len(points) < min_comparisons:
        reasons.append(f"{len(points)} prompts were compared, and at least {min_comparisons} are needed")
    if not low > required:
        reasons.append(
            f"the lower bound of the win rate, {low:.1%} at {confidence:.0%} confidence, does not exceed "
            f"{required:.1%}"
        )
    if not p_value <= alpha:
        reasons.append(
            f"two policies that are the same would do as well with probability {p_value:.2g}, above "
            f"{alpha:.2g}"
        )
    return GateResult(
        num_prompts=len(points),
        win_rate=math.fsum(shares) / len(shares),
        low=low,
        high=high,
        p_value=p_value,
        required=required,
        ties=sum(2 * point == size for point in points) / len(points),
        reasons=tuple(reasons),
    )


def half_points(outcomes: Sequence[Sequence[float]]) -> list[int]:
    """By prompt, twice the sum of its outcomes: a whole number, so the exact test needs no rounding."""
    if not outcomes or not outcomes[0]:
        raise ValueError("no comparisons: the gate has nothing to decide on")
    count = len(outcomes[0])
    for i, row in enumerate(outcomes):
        if len(row) != count:
            raise ValueError(f"prompt {i}: {len(row)} comparisons where the first prompt has {count}")
        if any(outcome not in (WIN, TIE, LOSS) for outcome in row):
            raise ValueError(f"prompt {i}: outcomes {list(row)}: each must be 1, 0.5 or 0")
    return [round(2 * sum(row)) for row in outcomes]


def score_bounds(shares: Sequence[float], confidence: float) -> tuple[float, float]:
    """One-sided bounds of the mean of `shares`, one number in [0, 1] a prompt; each bound at `confidence`.

    They solve (mean - p)^2 = z^2 (p (1 - p) - d) / n with d the mean of share (1 - share), since the variance
    of such a number with mean p is p (1 - p) - E[share (1 - share)]. Where all shares are 0 or 1, d is 0 and
    this is Wilson's score interval (1927); ties narrow it. Like Wilson's it is never certain of 0 or 1.
    """
    if not shares:
        raise ValueError("no prompts: a bound is undefined")
    n = len(shares)
    z = NormalDist().inv_cdf(confidence)
    mean = math.fsum(shares) / n
    inner = math.fsum(share * (1.0 - share) for share in shares) / n
    k = z * z / n
    # Never negative: the variance of the shares is not, and `inner` is at most 1/4.
    root = math.sqrt(max(0.0, k * (4.0 * (mean * (1.0 - mean) - inner) + k * (1.0 - 4.0 * inner))))
    centre = 2.0 * mean + k
    low, high = (centre - root) / (2.0 * (1.0 + k)), (centre + root) / (2.0 * (1.0 + k))
    return max(0.0, min(mean, low)), min(1.0, max(mean, high))


def exchange_p_value(deviations: Sequence[int]) -> float:
    """Chance that random signs of `deviations` give a sum at least as large as theirs.

    Fisher's randomisation test. `deviations` are whole numbers, one for each prompt: its distance from a tie.
    Exact: those of one size contribute a binomial, and the sizes are joined by convolution.
    """
    chances = np.ones(1)  # of each signed sum from -reach to reach
    for size, count in Counter(abs(d) for d in deviations if d).items():
        steps = np.zeros(2 * size * count + 1)
        steps[:: 2 * size] = _binomial_half(count)
        chances = np.convolve(chances, steps)
    reach = len(chances) // 2
    return min(1.0, float(chances[reach + sum(deviations) :].sum()))


def _binomial_half(count: int) -> list[float]:
    """Chances of 0 to `count` heads in as many throws of a fair coin."""
    return [math.comb(count, heads) / 2**count for heads in range(count + 1)]
