import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.evaluation.statistics import wilson
from rlhf_core.promotion.gate import exchange_p_value, half_points, judge_outcomes, score_bounds

OPTIONS = {"margin": 0.0, "confidence": 0.95, "min_comparisons": 20}
OUTCOMES = st.sampled_from([0.0, 0.5, 1.0])


def rows_of(wins, ties, losses):
    """Both orders of one pair of answers, which agree."""
    return [[1.0, 1.0]] * wins + [[0.5, 0.5]] * ties + [[0.0, 0.0]] * losses


def test_lower_bound_by_hand():
    # 3 wins and 1 tie of 4: mean 0.875, d = 0.0625, z = 1.644854, k = z^2 / 4 = 0.676386.
    # p = (2 * 0.875 + k - sqrt(k (4 (0.109375 - 0.0625) + k (1 - 0.25)))) / (2 (1 + k))
    #   = (2.426386 - sqrt(0.676386 * 0.694790)) / 3.352772 = 0.519221
    low, high = score_bounds([1, 1, 1, 0.5], 0.95)
    assert low == pytest.approx(0.519221, abs=1e-5)
    assert high == pytest.approx(0.928167, abs=1e-5)


def test_bounds_solve_their_equation():
    for shares in ([1, 0.5, 0, 1, 1, 0.75], [0.25, 0.5, 0.5, 1.0], [0, 0, 1]):
        mean = sum(shares) / len(shares)
        inner = sum(s * (1 - s) for s in shares) / len(shares)
        for p in score_bounds(shares, 0.9):
            variance = (p * (1 - p) - inner) / len(shares)
            assert (mean - p) ** 2 == pytest.approx(1.2815516**2 * variance, abs=1e-7)


@pytest.mark.parametrize(("wins", "losses"), [(8, 2), (5, 0), (0, 7), (60, 68)])
def test_without_ties_the_bounds_are_wilsons(wins, losses):
    two_sided = wilson(wins, wins + losses, 0.9)  # 5 % on each side
    low, high = score_bounds([1.0] * wins + [0.0] * losses, 0.95)
    assert (low, high) == pytest.approx((two_sided.low, two_sided.high))


def test_ties_alone_are_certain_of_one_half_and_pass_nothing():
    assert score_bounds([0.5] * 40, 0.95) == pytest.approx((0.5, 0.5))
    result = judge_outcomes(rows_of(0, 40, 0), **OPTIONS)
    assert not result.passes
    assert (result.win_rate, result.ties, result.p_value) == (0.5, 1.0, 1.0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0, 0.25, 0.5, 0.75, 1]), min_size=1, max_size=60))
def test_bounds_surround_the_mean_and_mirror(shares):
    mean = sum(shares) / len(shares)
    low, high = score_bounds(shares, 0.95)
    assert 0.0 <= low <= mean <= high <= 1.0
    mirrored = score_bounds([1 - s for s in shares], 0.95)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_p_value_of_five_wins_by_hand():
    assert exchange_p_value([2, 2, 2, 2, 2]) == 1 / 32
    assert exchange_p_value([2, 2, 2, 2, -2]) == 6 / 32  # all five, or four of five
    assert exchange_p_value([0, 0, 2]) == 0.5  # a tie says nothing
    assert exchange_p_value([]) == 1.0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_p_value_is_that_of_all_signs_counted_out(deviations):
    seen = sum(deviations)
    signed = [
        sum(s * abs(d) for s, d in zip(signs, deviations))
        for signs in itertools.product((1, -1), repeat=len(deviations))
    ]
    slow = sum(value >= seen for value in signed) / len(signed)
    assert exchange_p_value(deviations) == pytest.approx(slow, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=7), st.sampled_from([0.8, 0.9, 0.95]))
def test_swapped_policies_pass_at_most_as_often_as_the_level_says(sizes, confidence):
    """The theorem: over all ways in which the two can change places, at most 1 - confidence pass."""
    passed = 0
    for signs in itertools.product((1, -1), repeat=len(sizes)):
        deviations = [s * d for s, d in zip(signs, sizes)]
        passed += exchange_p_value(deviations) <= 1 - confidence
    assert passed / 2 ** len(sizes) <= 1 - confidence + 1e-12


def test_a_clear_winner_passes_and_the_loser_does_not():
    result = judge_outcomes(rows_of(30, 5, 5), **OPTIONS)
    assert result.passes
    assert result.win_rate == 32.5 / 40
    assert result.low > 0.5
    assert not judge_outcomes(rows_of(5, 5, 30), **OPTIONS).passes


def test_each_rule_stops_by_itself_and_says_why():
    few = judge_outcomes(rows_of(15, 0, 0), **OPTIONS)
    assert few.reasons == ("15 prompts were compared, and at least 20 are needed",)
    margin = judge_outcomes(rows_of(30, 0, 10), **OPTIONS | {"margin": 0.2})
    (reason,) = margin.reasons
    assert "does not exceed 70.0%" in reason
    # 13 of 20: Wilson's bound is below 1/2, and the exact chance of 13 or more heads is 0.13.
    both = judge_outcomes(rows_of(13, 0, 7), **OPTIONS)
    assert len(both.reasons) == 2
    assert both.p_value == pytest.approx(sum(math.comb(20, k) for k in range(13, 21)) / 2**20)


def test_orders_that_disagree_count_as_a_tie_and_prompts_are_the_units():
    turned = judge_outcomes([[1.0, 0.0]] * 40, **OPTIONS)
    assert (turned.win_rate, turned.ties) == (0.5, 1.0)
    # Ten samples of the same answers are no more evidence than one.
    once = judge_outcomes([[1.0]] * 13 + [[0.0]] * 7, **OPTIONS)
    often = judge_outcomes([[1.0] * 10] * 13 + [[0.0] * 10] * 7, **OPTIONS)
    assert (often.low, often.p_value) == pytest.approx((once.low, once.p_value))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no comparisons"),
        ([[]], "no comparisons"),
        ([[1.0], [1.0, 0.0]], "prompt 1: 2 comparisons where the first prompt has 1"),
        ([[0.7]], r"prompt 0: outcomes \[0.7\]: each must be 1, 0.5 or 0"),
    ],
)
def test_bad_outcomes_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        half_points(rows)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(OUTCOMES, OUTCOMES), min_size=2, max_size=40), st.data())
def test_a_better_outcome_never_fails_what_passed(rows, data):
    before = judge_outcomes(rows, **OPTIONS | {"min_comparisons": 1, "confidence": 0.8})
    at = data.draw(st.integers(0, len(rows) - 1))
    better = [*rows[:at], (1.0, 1.0), *rows[at + 1 :]]
    after = judge_outcomes(better, **OPTIONS | {"min_comparisons": 1, "confidence": 0.8})
    assert after.win_rate >= before.win_rate
    assert after.p_value <= before.p_value + 1e-12
    assert after.passes or not before.passes


def simulate(trials, prompts, orders, quality_gap, seed):
    """Share of sets that pass; both policies draw from the same distribution when the gap is 0.

    With exact ties, prompts of unlike difficulty, and a judge that likes the first place on some prompts.
    """
    rng = np.random.default_rng(seed)
    passed = 0
    for _ in range(trials):
        spread = rng.exponential(1.0, size=prompts)
        ours = np.round(rng.normal(quality_gap, 1.0, size=prompts) * spread)
        theirs = np.round(rng.normal(0.0, 1.0, size=prompts) * spread)
        liking = rng.choice([0.0, 0.0, 1.5], size=prompts) if orders == "biased" else np.zeros(prompts)
        first = (np.sign(ours - theirs + liking) + 1) / 2
        second = (np.sign(ours - theirs - liking) + 1) / 2
        rows = [[a, b] for a, b in zip(first.tolist(), second.tolist())]
        passed += judge_outcomes(rows, **OPTIONS).passes
    return passed / trials


@pytest.mark.parametrize("orders", ["fair", "biased"])
def test_policies_that_are_the_same_pass_at_most_at_the_nominal_rate(orders):
    # 5 % of 600 with a standard deviation of 0.9 %.
    assert simulate(600, 80, orders, 0.0, seed=1) <= 0.05 + 3 * 0.009


def test_a_better_policy_passes_more_often_than_not():
    assert simulate(200, 80, "fair", 0.7, seed=2) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [24, 48, 100, 256])
def test_null_rate_over_many_sets(prompts):
    trials = 8000
    rate = simulate(trials, prompts, "biased", 0.0, seed=prompts)
    assert rate <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)
    assert rate > 0.02  # and it is no gate that lets nothing through
