import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.evaluation.statistics import (
    Interval,
    accuracy_with_interval,
    bootstrap_mean,
    brier_score,
    expected_calibration_error,
    length_baseline_accuracy,
    paired_difference,
    wilson,
    win_rate,
)

OPTIONS = {"confidence": 0.95, "samples": 2000, "seed": 0}


def test_wilson_by_hand():
    # 8 of 10, z = 1.959964: (0.8 + 0.192073 -+ 1.959964 * sqrt(0.016 + 0.0096036)) / 1.384146
    interval = wilson(8, 10, 0.95)
    assert interval.estimate == 0.8
    assert interval.low == pytest.approx(0.49016, abs=1e-5)
    assert interval.high == pytest.approx(0.94330, abs=1e-4)


def test_wilson_bounds_solve_the_score_equation():
    # Its definition: the bounds are the p with |p - share| = z * sqrt(p (1 - p) / n).
    for successes, total in ((3, 7), (1, 40), (39, 40), (50, 100)):
        interval = wilson(successes, total, 0.9)
        for p in (interval.low, interval.high):
            assert abs(p - successes / total) == pytest.approx(1.6448536 * math.sqrt(p * (1 - p) / total))


def test_wilson_is_not_certain_at_the_ends():
    assert wilson(5, 5, 0.95).high == 1.0
    assert wilson(5, 5, 0.95).low == pytest.approx(5 / (5 + 1.959964**2))
    assert wilson(0, 5, 0.95).low == 0.0
    assert wilson(0, 5, 0.95).high == pytest.approx(1 - 5 / (5 + 1.959964**2))


@pytest.mark.parametrize(("successes", "total"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes, total):
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, total, 0.95)


def test_bootstrap_mean_agrees_with_the_normal_approximation():
    values = np.random.default_rng(3).normal(2.0, 1.5, size=400)
    interval = bootstrap_mean(values.tolist(), **OPTIONS)
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert interval.estimate == pytest.approx(values.mean())
    # 2,000 resamples place a bound within some 4 % of a standard error; 0.15 leaves room.
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_bootstrap_mean_of_two_values_by_hand():
    # Resamples of {0, 1} have means 0, 1/2, 1 with chances 1/4, 1/2, 1/4: tails of 20 % fall into 0 and 1.
    interval = bootstrap_mean([0.0, 1.0], confidence=0.6, samples=2000, seed=1)
    assert (interval.low, interval.estimate, interval.high) == (0.0, 0.5, 1.0)
    # Tails of 30 % fall into the middle value.
    interval = bootstrap_mean([0.0, 1.0], confidence=0.4, samples=2000, seed=1)
    assert (interval.low, interval.high) == (0.5, 0.5)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        values = rng.exponential(1.0, size=60)
        interval = bootstrap_mean(values.tolist(), confidence=0.9, samples=400, seed=seed)
        covered += interval.low <= 1.0 <= interval.high
    # 90 % of 200 with a standard deviation of 4.2; the percentile method is a little short on skewed data.
    assert 164 <= covered <= 194


def test_paired_difference_removes_what_the_prompts_share():
    rng = np.random.default_rng(1)
    prompts = rng.normal(0, 10, size=80)
    before, after = prompts, prompts + 0.5 + rng.normal(0, 0.1, size=80)
    interval = paired_difference(before.tolist(), after.tolist(), **OPTIONS)
    assert interval.estimate == pytest.approx((after - before).mean())
    assert 0.4 < interval.low < interval.high < 0.6


def test_paired_difference_needs_pairs():
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0], [1.0, 2.0], **OPTIONS)


def test_win_rate_counts_ties_one_half():
    assert win_rate([1, 2, 3, 0], [0, 2, 4, -1], **OPTIONS).estimate == 0.625  # win, tie, loss, win


def test_win_rate_is_never_certain():
    interval = win_rate([1.0] * 9, [0.0] * 9, **OPTIONS)
    assert interval == wilson(9, 9, 0.95)
    assert win_rate([0.0] * 9, [1.0] * 9, **OPTIONS).high > 0.2


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=20))
def test_win_rates_of_both_sides_sum_to_one(pairs):
    ours, theirs = zip(*pairs)
    options = OPTIONS | {"samples": 100}
    a, b = win_rate(ours, theirs, **options), win_rate(theirs, ours, **options)
    assert a.estimate + b.estimate == pytest.approx(1.0)
    assert a.low <= a.estimate <= a.high


def test_accuracy_counts_pairs_and_resamples_prompts():
    correct = [True, True, True, False, False]
    groups = ["a", "a", "a", "b", "c"]
    interval = accuracy_with_interval(correct, groups, confidence=0.95, seed=0)
    assert interval.estimate == 0.6
    # Resampled by prompt, no "a" (chance 8/27) gives 0 and only "a" (1/27, more than 2.5 %) gives 1.
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_accuracy_interval_is_wider_when_pairs_share_a_prompt():
    rng = np.random.default_rng(2)
    by_prompt = rng.random(50) < 0.7
    correct = [bool(c) for c in by_prompt for _ in range(4)]
    shared = accuracy_with_interval(correct, [i // 4 for i in range(200)], confidence=0.95, seed=0)
    alone = accuracy_with_interval(correct, list(range(200)), confidence=0.95, seed=0)
    ratio = (shared.high - shared.low) / (alone.high - alone.low)
    assert ratio == pytest.approx(2.0, rel=0.15)  # sqrt(4): 50 units instead of 200


def test_accuracy_all_right_counts_prompts_not_pairs():
    interval = accuracy_with_interval([True] * 12, ["a"] * 6 + ["b"] * 6, confidence=0.95, seed=0)
    assert interval == wilson(2, 2, 0.95)


def test_length_baseline_takes_the_better_rule():
    assert length_baseline_accuracy([3, 5, 2, 7], [1, 4, 6, 7]) == 0.625  # two longer, one shorter, one equal
    assert length_baseline_accuracy([1, 4, 6], [3, 5, 2]) == pytest.approx(2 / 3)  # shorter wins
    with pytest.raises(ValueError, match="no pairs"):
        length_baseline_accuracy([], [])


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(5).normal(size=30).tolist()
    assert bootstrap_mean(values, **OPTIONS) == bootstrap_mean(values, **OPTIONS)
    assert bootstrap_mean(values, **OPTIONS) != bootstrap_mean(values, **OPTIONS | {"seed": 1})


def test_interval_names_its_metrics():
    assert Interval(0.5, 0.25, 0.75).as_metrics("eval/x") == {
        "eval/x": 0.5,
        "eval/x_low": 0.25,
        "eval/x_high": 0.75,
    }


def test_brier_score_by_hand():
    assert brier_score([1.0, 0.5, 0.0]) == pytest.approx((0 + 0.25 + 1) / 3)


def test_calibration_error_by_hand():
    # confidence .95 twice, right once: |.5 - .95|; confidence .55 (p = .45), wrong: |0 - .55|
    assert expected_calibration_error([0.95, 0.05, 0.45]) == pytest.approx((2 * 0.45 + 0.55) / 3)


def test_honest_probabilities_are_calibrated_and_bold_ones_are_not():
    rng = random.Random(0)
    honest = []
    for _ in range(20_000):
        p = rng.uniform(0.5, 1.0)
        honest.append(p if rng.random() < p else 1 - p)
    assert expected_calibration_error(honest) < 0.02
    bold = [min(0.999, p + 0.2) if p > 0.5 else max(0.001, p - 0.2) for p in honest]
    assert expected_calibration_error(bold) > 0.1
