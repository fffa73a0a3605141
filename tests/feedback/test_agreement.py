"""Alpha and kappa against published and hand-worked values, and against the package krippendorff."""

from __future__ import annotations

import math

import krippendorff
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.agreement import (
    agreement,
    alpha_interval,
    cohen_kappa,
    disagreement_costs,
    krippendorff_alpha,
    pairwise_kappa,
)
from tests.feedback.collections import pairs

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: four observers, twelve units.
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]
UNITS = [[value for value in column if value is not None] for column in zip(*OBSERVERS)]


@pytest.mark.parametrize(
    ("level", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)]
)
def test_alpha_of_the_published_example(level, published):
    assert krippendorff_alpha(UNITS, level) == pytest.approx(published, abs=5e-4)


def test_alpha_by_hand():
    # Coincidences: aa 2, bb 2, ab 1, ba 1; n = 6, n_a = n_b = 3.
    # D_o = 2 / 6; D_e = 2 * 3 * 3 / (6 * 5) = 0.6; alpha = 1 - (1/3) / 0.6 = 4/9.
    assert krippendorff_alpha([["a", "a"], ["b", "b"], ["a", "b"]], "nominal") == pytest.approx(4 / 9)


ratings = st.lists(st.lists(st.none() | st.integers(1, 5), min_size=8, max_size=8), min_size=2, max_size=5)


@settings(deadline=None)
@given(ratings, st.sampled_from(["nominal", "ordinal", "interval"]))
def test_alpha_is_that_of_the_package_krippendorff(rows, level):
    units = [[value for value in column if value is not None] for column in zip(*rows)]
    found = krippendorff_alpha(units, level)
    values = {value for unit in units if len(unit) > 1 for value in unit}
    if len(values) < 2:
        assert math.isnan(found)
        return
    matrix = np.array([[math.nan if value is None else value for value in row] for row in rows])
    assert found == pytest.approx(krippendorff.alpha(matrix, level_of_measurement=level), abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from("abc"), min_size=2, max_size=4), min_size=2, max_size=8))
def test_alpha_does_not_depend_on_the_order_of_units_and_labels(units):
    turned = [unit[::-1] for unit in units[::-1]]
    assert krippendorff_alpha(turned, "nominal") == pytest.approx(
        krippendorff_alpha(units, "nominal"), nan_ok=True
    )


def test_full_agreement_is_1_and_no_variation_is_undefined():
    assert krippendorff_alpha([["a", "a"], ["b", "b"]], "nominal") == 1.0
    assert math.isnan(krippendorff_alpha([["a", "a"], ["a", "a"]], "nominal"))
    assert math.isnan(krippendorff_alpha([["a"], ["b"]], "nominal"))


def test_the_interval_holds_alpha_and_narrows_with_units():
    few, many = alpha_interval(UNITS, "nominal"), alpha_interval(UNITS * 20, "nominal")
    assert few[0] < 0.743 < few[1]
    assert many[1] - many[0] < 0.5 * (few[1] - few[0])
    assert alpha_interval(UNITS, "nominal") == few


def test_kappa_by_hand():
    # 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: p_o = 0.7, p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5; kappa = 0.4.
    table = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    assert cohen_kappa(table) == pytest.approx(0.4)


def test_weighted_kappa_counts_the_whole_distance():
    # Ratings 1 and 5 alone: linear weights are all 4, so it is as unweighted.
    table = [(1, 1), (1, 5), (5, 5), (5, 5)]
    assert cohen_kappa(table, "ordinal") == pytest.approx(cohen_kappa(table, "nominal"))
    # A near miss costs a quarter of a far one.
    near, far = [(1, 1), (5, 5), (1, 2), (5, 5)], [(1, 1), (5, 5), (1, 5), (5, 5)]
    assert cohen_kappa(near, "ordinal") > cohen_kappa(far, "ordinal")


def test_kappa_of_each_two_annotators_on_what_both_saw():
    collection = pairs(
        {
            "i1": {"ann": "a", "bob": "a", "cat": "b"},
            "i2": {"ann": "b", "bob": "b"},
            "i3": {"ann": "a", "bob": "b", "cat": "b"},
            "i4": {"ann": "b", "bob": "b"},
        }
    )
    found = {(one.first, one.second): one for one in pairwise_kappa(collection) if one.criterion == "choice"}
    # ann a b a b, bob a b b b: p_o = 3/4, p_e = 1/2 * 1/4 + 1/2 * 3/4 = 1/2; kappa = 1/2.
    assert found["ann", "bob"].kappa == pytest.approx(0.5)
    assert found["ann", "bob"].observed == 0.75
    assert found["ann", "bob"].num_units == 4
    assert found["ann", "cat"].observed == 0.0


def test_excluded_annotators_do_not_count_in_agreement():
    table = {"i1": {"ann": "a", "bob": "a"}, "i2": {"ann": "b", "bob": "b"}}
    noisy = {name: given | {"eve": "tie"} for name, given in table.items()}
    assert agreement(pairs(noisy, excluded=["eve"])) == agreement(pairs(table))
    assert agreement(pairs(noisy)) != agreement(pairs(table))


def test_cost_of_disagreement_by_hand():
    collection = pairs(
        {
            "i1": {"ann": "a", "bob": "b", "cat": "a"},  # two further votes of 10 s on a disputed item
            "i2": {"ann": "a", "bob": "a"},
            "i3": {"ann": "a"},
        }
    )
    cost = {one.criterion: one for one in disagreement_costs(collection)}["choice"]
    assert (cost.num_units, cost.num_disputed, cost.extra_votes, cost.extra_seconds) == (2, 1, 2, 20.0)
    assert cost.disagreement == pytest.approx((2 / 3 + 0) / 2)


def test_cost_by_criterion_of_ratings():
    from feedback.records import Ratings

    collection = pairs(
        {
            "i1": {
                "ann": Ratings(ratings={"tone": 1, "truth": 3}),
                "bob": Ratings(ratings={"tone": 5, "truth": 3}),
            }
        },
        kind="rating",
    )
    costs = {one.criterion: one for one in disagreement_costs(collection)}
    assert (costs["tone"].num_disputed, costs["tone"].disagreement) == (1, 1.0)
    assert (costs["truth"].num_disputed, costs["truth"].extra_seconds) == (0, 0.0)
