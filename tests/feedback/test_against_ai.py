"""A labeler against people, with values worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from feedback.against_ai import agreements, comparisons, label_of
from feedback.records import Label, Ranking, Ratings

from .collections import choice, item, pairs


def people_say(collection, **options):
    return [(one.criterion, one.first, one.second, one.people) for one in comparisons(collection, **options)]


def test_pairs_are_the_majoritys_and_both_bad_and_gold_are_left_out():
    table = {
        "i1": {"ann": "a2", "bob": "a1", "cat": "b1"},
        "i2": {"ann": "tie"},
        "i3": {"ann": "a1", "bob": "b1"},
        "i4": {"ann": "bad"},
        "i5": {"ann": "b3"},
        "i6": {"ann": "b3"},
    }
    items = [item(name, gold=choice("a") if name == "i6" else None) for name in table]
    found = people_say(pairs(table, items=items))
    assert [(first, people) for _, first, _, people in found] == [
        ("i1 answer 0", "a"),
        ("i2 answer 0", "tie"),
        ("i3 answer 0", "tie"),
        ("i5 answer 0", "b"),
    ]
    assert {name for name, *_ in found} == {"choice"}


def test_each_pair_of_a_ranking_and_each_criterion_of_ratings_is_a_comparison():
    ranked = pairs({"i1": {"ann": Ranking(ranks=(2, 1, 2))}}, kind="ranking")
    assert [people for *_, people in people_say(ranked)] == ["b", "tie", "a"]
    table = {
        "r1": {
            "ann": Ratings(ratings={"tone": 5, "truth": 2}),
            "bob": Ratings(ratings={"tone": 4, "truth": 2}),
        },
        "r2": {"ann": Ratings(ratings={"tone": 4, "truth": 2})},
        "r3": {"ann": Ratings(ratings={"tone": 1, "truth": 1})},
    }
    items = [item(name, "rating", prompt="other?" if name == "r3" else "same?") for name in table]
    rated = people_say(pairs(table, kind="rating", items=items))
    assert rated == [
        ("tone", "r1 answer 0", "r2 answer 0", "a"),
        ("truth", "r1 answer 0", "r2 answer 0", "tie"),
    ]
    labels = {"l1": {"ann": Label(good=False)}, "l2": {"ann": Label(good=True)}}
    items = [item(name, "label", prompt="same?") for name in labels]
    ((_, _, _, people),) = people_say(pairs(labels, kind="label", items=items))
    assert people == "b"


def test_a_share_is_drawn_by_prompt_and_grows_with_the_share():
    collection = pairs({f"i{n}": {"ann": "a1"} for n in range(200)})
    drawn = {share: {one.first for one in comparisons(collection, share)} for share in (0.2, 0.5, 1.0)}
    assert drawn[0.2] < drawn[0.5] < drawn[1.0]
    assert 20 <= len(drawn[0.2]) <= 60
    assert {one.first for one in comparisons(collection, 0.5, seed=1)} != drawn[0.5]


@pytest.mark.parametrize(
    ("first", "second", "margin", "label"),
    [(0.5, 0.2, 0.1, "a"), (0.2, 0.5, 0.1, "b"), (0.5, 0.45, 0.1, "tie"), (0.5, 0.5, 0.0, "tie")],
)
def test_labels_follow_scores_and_close_ones_are_ties(first, second, margin, label):
    assert label_of(first, second, margin) == label


def test_kappa_and_raw_agreement_are_those_worked_by_hand():
    # People a a a b b tie, labeler a a b b b a: 4 of 6 agree. By chance: a 3/6*3/6, b 2/6*3/6, tie 1/6*0
    # = 9/36 + 6/36 = 15/36, so kappa = (24/36 - 15/36) / (21/36) = 3/7.
    table = dict(
        zip([f"i{n}" for n in range(6)], [{"ann": x} for x in ("a1", "a1", "a1", "b1", "b1", "tie")])
    )
    found = comparisons(pairs(table))
    (one,) = agreements(found, ["a", "a", "b", "b", "b", "a"])
    assert one.num == 6
    assert one.observed == pytest.approx(4 / 6)
    assert one.kappa == pytest.approx(3 / 7)
    assert one.equal == (True, True, False, True, True, False)
    other = [replace(one, project="q") for one in found]
    everything = agreements([*found, *other], ["a", "a", "b", "b", "b", "a"] + ["b"] * 6)
    assert [(one.project, one.num, round(one.observed, 3)) for one in everything] == [
        ("all", 12, 0.5),  # 4 and 2 of 12
        ("p", 6, 0.667),
        ("q", 6, 0.333),
    ]
    (same,) = agreements(found[:3], ["a", "a", "a"])
    assert same.observed == 1.0
    assert math.isnan(same.kappa)
