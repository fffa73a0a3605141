"""Majority and Dawid-Skene by hand, decisions above votes, and the adjudication queue."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings

from feedback.collection import collect
from feedback.consensus import (
    DisagreementRule,
    adjudication_queue,
    consensus,
    dawid_skene,
    leading,
    majority,
    mean_strength,
)
from feedback.records import Ratings
from feedback.units import Unit
from tests.feedback.collections import collections, decision, item, pairs, people, project, vote


def test_majority_by_hand():
    assert majority({"ann": "a", "bob": "a", "cat": "tie", "dan": "b"}) == {"a": 0.5, "b": 0.25, "tie": 0.25}
    assert leading({"a": 0.5, "b": 0.25, "tie": 0.25}) == "a"
    assert leading({"a": 0.5, "b": 0.5}) is None


def em_by_hand(table, classes, steps):
    """Dawid and Skene 1979, equations 2.3 to 2.5, written out slowly."""
    posterior = {
        unit: {c: sum(label == c for label in given.values()) / len(given) for c in classes}
        for unit, given in table.items()
    }
    annotators = sorted({who for given in table.values() for who in given})
    for _ in range(steps):
        prior = {c: sum(own[c] for own in posterior.values()) / len(posterior) for c in classes}
        confusion = {}
        for who in annotators:
            for true in classes:
                seen = {
                    label: sum(posterior[unit][true] for unit in table if table[unit].get(who) == label)
                    for label in classes
                }
                total = sum(seen.values())
                for label in classes:
                    confusion[who, true, label] = seen[label] / total
        for unit, own in table.items():
            likelihood = {
                c: prior[c] * math.prod(confusion[who, c, label] for who, label in own.items())
                for c in classes
            }
            posterior[unit] = {c: likelihood[c] / sum(likelihood.values()) for c in classes}
    return posterior


def test_dawid_skene_is_the_em_of_the_paper():
    rng = random.Random(5)
    table = {}
    for number in range(40):
        true = rng.choice("ab")
        other = "b" if true == "a" else "a"
        skill = {"ann": 0.9, "bob": 0.8, "cat": 0.7, "dan": 0.55}
        table[f"i{number:02}"] = {who: true if rng.random() < p else other for who, p in skill.items()}
    labels = {Unit(name, "choice"): given for name, given in table.items()}
    for steps in (1, 3):
        found, expected = dawid_skene(labels, num_iterations=steps), em_by_hand(table, "ab", steps)
        for name in table:
            for label in "ab":
                assert found[Unit(name, "choice")][label] == pytest.approx(expected[name][label], abs=1e-6)


def test_dawid_skene_trusts_the_reliable():
    # ann and bob agree on all else, eve contradicts them half of the time: alone against eve, ann wins.
    table = {
        f"i{n:02}": {"ann": x, "bob": x, "eve": e} for n, (x, e) in enumerate(zip("abab" * 5, "aabb" * 5))
    }
    labels = {Unit(name, "choice"): given for name, given in table.items()}
    labels[Unit("z", "choice")] = {"ann": "a", "eve": "b"}
    assert majority(labels[Unit("z", "choice")]) == {"a": 0.5, "b": 0.5}
    assert dawid_skene(labels)[Unit("z", "choice")]["a"] > 0.9


def test_dawid_skene_of_one_label_and_of_nothing():
    unit = Unit("i", "choice")
    assert dawid_skene({}) == {}
    assert dawid_skene({unit: {"ann": "tie", "bob": "tie"}}) == {unit: {"tie": 1.0}}


def test_a_decision_stands_above_the_votes():
    table = {"i1": {"ann": "a", "bob": "a"}, "i2": {"ann": "b1", "bob": "a3"}}
    collection = pairs(table, decisions=[decision("i1", "b3")])
    for method in ("majority", "dawid_skene"):
        assert consensus(collection, method)[Unit("i1", "choice")] == {"b": 1.0}
    assert mean_strength(collection.counted(), "i1") == -3.0
    assert mean_strength(collection.counted(), "i2") == 1.0  # (-1 + 3) / 2


def test_the_queue_holds_what_votes_dispute():
    collection = pairs(
        {
            "agreed": {"ann": "a", "bob": "a", "cat": "a"},
            "two-thirds": {"ann": "a", "bob": "a", "cat": "b1"},
            "split": {"ann": "a1", "bob": "b1"},
            "three-ways": {"ann": "a1", "bob": "b1", "cat": "tie"},
            "single": {"ann": "a"},
            "decided": {"ann": "a", "bob": "b"},
            "opposed": {"ann": "a3", "bob": "a3", "cat": "b3"},
        },
        decisions=[decision("decided", "a")],
    )
    queue = adjudication_queue(collection)
    assert [(one.item, round(one.severity, 3)) for one in queue] == [
        ("opposed", 1.0),
        ("three-ways", 0.667),
        ("split", 0.5),
    ]
    assert queue[0].reason == "strength: -3 to 3, more than 4 apart"
    assert queue[2].reason == "choice: 1 x a, 1 x b"
    assert adjudication_queue(collection, DisagreementRule(min_votes=4)) == []


def test_ratings_are_disputed_by_their_range():
    def both(tone, other):
        return {
            "ann": Ratings(ratings={"tone": tone, "truth": 3}),
            "bob": Ratings(ratings={"tone": other, "truth": 3}),
        }

    collection = pairs({"near": both(1, 3), "far": both(1, 4)}, kind="rating")
    assert [one.item for one in adjudication_queue(collection)] == ["far"]


@settings(deadline=None)
@given(collections())
def test_shares_add_up_to_1_and_excluded_votes_are_not_among_them(collection):
    counted = collection.counted()
    voters = {vote.annotator for vote in counted.votes}
    assert not voters & {person.id for person in collection.annotators if person.excluded}
    for shares in consensus(collection).values():
        assert sum(shares.values()) == pytest.approx(1.0)


def test_the_last_vote_of_an_annotator_counts_whatever_its_id():
    votes = [
        vote("i1", "ann", "a", minutes=0, id="z"),
        vote("i1", "ann", "b", minutes=5, id="y"),
        vote("i1", "ann", "tie", minutes=2, id="x"),
    ]
    collection = collect(project(), [item("i1")], votes, people("ann"))
    assert [one.id for one in collection.counted().votes] == ["y"]
    assert consensus(collection) == {Unit("i1", "choice"): {"b": 1.0}}
