"""Accuracy, speed and position bias by hand and by simulated annotators with known faults."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from scipy.stats import beta, binom

from feedback.annotators import (
    ExclusionRule,
    gold_accuracy,
    holm,
    is_right,
    position_bias,
    speed,
    suggest_exclusions,
)
from feedback.collection import collect
from feedback.records import Label, Ranking, Ratings, Vote
from feedback.simulate import SimulatedAnnotator
from tests.feedback.collections import START, choice, item, pairs, people, project, vote


def gold_items(count):
    return [item(f"i{n:03}", gold=choice("a" if n % 3 else "b")) for n in range(count)]


def test_accuracy_and_its_exact_interval():
    items = gold_items(10)
    table = {
        one.id: {"ann": one.gold.choice if n < 8 else "tie", "bob": "tie"} for n, one in enumerate(items)
    }
    ann, bob = gold_accuracy(pairs(table, items=items))
    assert (ann.num_right, ann.num_gold, ann.accuracy) == (8, 10, 0.8)
    # Clopper and Pearson 1934: quantiles of beta distributions.
    assert ann.low == pytest.approx(beta.ppf(0.025, 8, 3))
    assert ann.high == pytest.approx(beta.ppf(0.975, 9, 2))
    assert (bob.num_right, bob.low) == (0, 0.0)
    assert bob.high == pytest.approx(1 - 0.025 ** (1 / 10))


@pytest.mark.parametrize(
    ("value", "gold", "right"),
    [
        (choice("a1"), choice("a3"), True),
        (choice("a"), choice("b"), False),
        (choice("tie"), choice("tie"), True),
        (choice("bad"), choice("tie"), False),
        (Ranking(ranks=(1, 2, 2)), Ranking(ranks=(1, 2, 2)), True),
        (Ranking(ranks=(1, 2, 3)), Ranking(ranks=(1, 2, 2)), False),
        (Ratings(ratings={"x": 3, "y": 5}), Ratings(ratings={"x": 4, "y": 5}), True),
        (Ratings(ratings={"x": 2, "y": 5}), Ratings(ratings={"x": 4, "y": 5}), False),
        (Label(good=True), Label(good=False), False),
    ],
)
def test_what_is_right(value, gold, right):
    assert is_right(value, gold) is right


def first_shown(count, of):
    """Votes for the answer shown first in `count` of `of` items, on alternating sides."""
    found = []
    for n in range(of):
        sides = (0, 1) if n % 2 else (1, 0)
        wins = sides[0] if n < count else sides[1]
        found.append(vote(f"i{n:03}", "ann", "ab"[wins], sides=sides))
    return found


def test_position_bias_is_an_exact_binomial_test():
    items = [item(f"i{n:03}") for n in range(12)]
    votes = [*first_shown(9, 10), vote("i010", "ann", "tie", sides=(0, 1)), vote("i011", "ann", "a")]
    (found,) = position_bias(collect(project(), items, votes, people("ann")))
    assert (found.num_first, found.num_decisive, found.share) == (9, 10, 0.9)
    # 2 * (C(10,9) + C(10,10)) / 2^10 = 22 / 1024
    assert found.p_value == pytest.approx(22 / 1024)
    assert found.p_value == pytest.approx(2 * binom.sf(8, 10, 0.5))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def simulated(*annotators, count=200):
    items = [
        item(f"i{n:03}", texts=["word " * 20, "text " * 20], gold=choice("ab"[n % 2])) for n in range(count)
    ]
    votes = []
    for annotator in annotators:
        for n, one in enumerate(items):
            sides = (n // 2 % 2, 1 - n // 2 % 2)
            votes.append(
                Vote(
                    id=f"{annotator.id}-{one.id}",
                    project="p",
                    item=one.id,
                    annotator=annotator.id,
                    kind="pairwise",
                    value=annotator.vote(one, sides),
                    seconds=annotator.seconds_for(one),
                    sides=sides,
                    at=START,
                )
            )
    return collect(project(), items, votes, people(*[one.id for one in annotators]))


def truth(one):
    return (0.8, 0.2) if one.gold.choice == "a" else (0.2, 0.8)


def test_simulated_faults_are_found_and_the_careful_are_not_accused():
    collection = simulated(
        SimulatedAnnotator("careful", truth, noise=0.1),
        SimulatedAnnotator("steady", truth, noise=0.2, seed=1),
        SimulatedAnnotator("left", truth, noise=0.1, position_bias=0.5),
        SimulatedAnnotator("random", lambda one: (0.5, 0.5), noise=1.0),
        SimulatedAnnotator("hasty", truth, noise=0.1, characters_per_second=1e4, seconds=0.5),
    )
    suggested = suggest_exclusions(collection, ExclusionRule(min_accuracy=0.7))
    assert set(suggested) == {"left", "random", "hasty"}
    assert "the answer shown first won" in suggested["left"][-1]
    assert "gold items right" in suggested["random"][0]
    assert "faster than the answers can be read" in suggested["hasty"][0]


def test_speed_sees_the_hasty_and_forgets_votes_without_a_time():
    items = [item(f"i{n}", texts=["x" * 300, "y" * 300]) for n in range(4)]
    votes = [vote(one.id, "ann", "a", seconds=9.9) for one in items[:2]]
    votes += [vote(one.id, "ann", "a", seconds=10.1) for one in items[2:]]
    votes += [vote(one.id, "bob", "a", seconds=0.0) for one in items]
    (found,) = speed(collect(project(), items, votes, people("ann", "bob")))
    # 600 characters at 60 a second are 10 seconds.
    assert (found.annotator, found.num_votes, found.num_fast, found.median_seconds) == ("ann", 4, 2, 10.0)
    assert found.outlier
    assert math.isnan(found.deviations)


def test_simulated_choices_follow_bradley_and_terry():
    annotator = SimulatedAnnotator("ann", lambda one: (0.6, 0.4), noise=0.2)
    items = [item(f"i{n}") for n in range(4000)]
    won = sum(annotator.vote(one).choice == "a" for one in items)
    expected = 1 / (1 + math.exp(-0.2 / 0.2))
    assert abs(won / 4000 - expected) < 4 * math.sqrt(expected * (1 - expected) / 4000)


def test_simulated_position_bias_is_the_share_asked_for():
    annotator = SimulatedAnnotator("ann", lambda one: (1.0, 0.0), position_bias=0.3)
    items = [item(f"i{n}") for n in range(3000)]
    won = Counter(annotator.vote(one, (1, 0)).choice for one in items)  # the worse answer stands first
    assert abs(won["b"] / 3000 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 3000)


def test_a_simulated_annotator_repeats_itself_and_answers_every_kind():
    scores = {1: (0.9,), 2: (0.9, 0.1), 3: (0.9, 0.1, 0.5)}
    annotator = SimulatedAnnotator(
        "ann", lambda one: scores[len(one.responses)], criteria=("tone", "truth"), write=lambda one: "better"
    )
    found = {kind: annotator.vote(item("i", kind)) for kind in ("pairwise", "ranking", "rating", "label")}
    assert found["pairwise"] == choice("a3")
    assert found["ranking"] == Ranking(ranks=(1, 3, 2))
    assert found["rating"] == Ratings(ratings={"tone": 5, "truth": 5})
    assert found["label"] == Label(good=True)
    assert (
        annotator.vote(item("i", "critique")).text == annotator.vote(item("i", "correction")).text == "better"
    )
    noisy = SimulatedAnnotator("ann", lambda one: (0.5, 0.5), noise=1.0)
    assert [noisy.vote(item(f"i{n}")) for n in range(9)] == [noisy.vote(item(f"i{n}")) for n in range(9)]
    with pytest.raises(ValueError, match="has no `write`"):
        noisy.vote(item("i", "critique"))
    with pytest.raises(ValueError, match="2 gold scores for 3 responses"):
        noisy.vote(item("i", "ranking"))
