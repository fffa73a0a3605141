"""Rows of each kind of item, by hand."""

from __future__ import annotations

import json

import pytest

from feedback.records import Choice, Correction, Critique, Label, Ranking, Ratings
from feedback.rows import RowRules, make_rows
from tests.feedback.collections import decision, item, pairs


def one_pair(given_votes, *, decisions=(), **rules):
    rows = make_rows(pairs({"i1": given_votes}, decisions=decisions), RowRules(**rules))
    assert len(rows.preferences) <= 1
    return rows.preferences[0] if rows.preferences else None


def test_a_pair_by_hand():
    row = one_pair({"ann": "b3", "bob": "b1", "cat": "a1"})
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("question i1?", "i1 answer 1", "i1 answer 0")
    assert row["votes"] == {"chosen": 2, "rejected": 1, "tie": 0, "bad": 0}
    assert row["margin"] == 1.0  # (3 + 1 - 1) / 3
    assert row["probability"] == 1.0
    assert row["policies"] == {"chosen": "m1", "rejected": "m0"}
    assert row["at"] == "2026-03-01T12:00:00+00:00"
    assert len(row["annotators"]) == 3
    assert not any(name in json.dumps(row) for name in ('ann"', "bob", 'cat"'))


@pytest.mark.parametrize(
    ("ties", "votes", "probability", "chosen"),
    [
        ("keep", {"ann": "tie", "bob": "tie", "cat": "a"}, 0.5, 0),
        ("keep", {"ann": "a", "bob": "b"}, 0.5, 0),
        ("drop", {"ann": "tie", "bob": "tie", "cat": "a"}, None, None),
        ("drop", {"ann": "a", "bob": "b"}, None, None),
        ("drop", {"ann": "b", "bob": "b", "cat": "tie"}, 1.0, 1),
        ("soften", {"ann": "tie", "bob": "tie", "cat": "a"}, 0.666667, 0),  # (1 + 2 / 2) / 3
        ("soften", {"ann": "b", "bob": "b", "cat": "a"}, 0.666667, 1),
        ("soften", {"ann": "b", "bob": "bad", "cat": "tie"}, 0.75, 1),  # (1 + 1 / 2) / 2
        ("soften", {"ann": "tie"}, 0.5, 0),
        ("soften", {"ann": "a", "bob": "b", "cat": "tie"}, 0.5, 0),
        ("keep", {"ann": "bad", "bob": "bad", "cat": "a"}, None, None),
    ],
)
def test_ties_are_kept_dropped_or_softened(ties, votes, probability, chosen):
    row = one_pair(votes, ties=ties)
    assert (row and row["probability"]) == probability
    if row:
        assert row["chosen"] == f"i1 answer {chosen}"


def test_a_decision_settles_a_disputed_pair():
    split = {"ann": "a", "bob": "b"}
    assert one_pair(split, disputed="drop") is None
    row = one_pair(split, disputed="drop", ties="drop", decisions=[decision("i1", "b1")])
    assert (row["chosen"], row["margin"], row["adjudicated"]) == ("i1 answer 1", 1.0, True)
    assert row["at"] == "2026-03-02T12:00:00+00:00"


def test_a_ranking_gives_all_pairs_of_one_group():
    table = {
        "i1": {
            "ann": Ranking(ranks=(2, 1, 3)),
            "bob": Ranking(ranks=(3, 1, 2)),
            "cat": Ranking(ranks=(2, 1, 2)),
        }
    }
    rows = make_rows(pairs(table, kind="ranking"), RowRules(ties="soften")).preferences
    found = {(row["chosen"][-1], row["rejected"][-1]): row["probability"] for row in rows}
    # Answer 0 against 2: ann a, bob b, cat a tie.
    assert found == {("1", "0"): 1.0, ("1", "2"): 1.0, ("0", "2"): 0.5}
    assert len({row["group"] for row in rows}) == 1
    assert "margin" not in rows[0]


def test_ratings_make_pairs_by_margin():
    def rated(tone, truth):
        return Ratings(ratings={"tone": tone, "truth": truth})

    items = [
        item(name, "rating", prompt) for name, prompt in (("x", "q"), ("y", "q"), ("z", "q"), ("w", "other"))
    ]
    table = {
        "x": {"ann": rated(5, 5), "bob": rated(4, 4)},  # 4.5
        "y": {"ann": rated(4, 4)},  # 4
        "z": {"ann": rated(2, 1), "bob": rated(2, 3)},  # 2
        "w": {"ann": rated(1, 1)},
    }
    collection = pairs(table, kind="rating", items=items)
    rows = make_rows(collection, RowRules(min_margin=1.0))
    found = {(row["chosen"], row["rejected"]): row for row in rows.preferences}
    assert {pair: row["margin"] for pair, row in found.items()} == {
        ("x answer 0", "z answer 0"): 2.5,
        ("y answer 0", "z answer 0"): 2.0,
    }
    row = found["x answer 0", "z answer 0"]
    assert (row["chosen_score"], row["rejected_score"], row["items"]) == (4.5, 2.0, ["x", "z"])
    assert rows.left_out == {"no other answer far enough in score": 1}
    weighted = make_rows(collection, RowRules(min_margin=0.1, criteria_weights={"tone": 0.0})).preferences
    assert {row["rejected_score"] for row in weighted} == {2.0, 4.0}
    with pytest.raises(ValueError, match=r"criteria_weights: \['speed'\] must be of the criteria"):
        make_rows(collection, RowRules(criteria_weights={"speed": 1.0}))


def test_labels_critiques_and_corrections():
    items = [item(name, "label", "q") for name in ("x", "y")]
    rows = make_rows(
        pairs({"x": {"ann": Label(good=True)}, "y": {"ann": Label(good=False)}}, kind="label", items=items)
    )
    assert [(row["completion"], row["label"]) for row in rows.labels] == [
        ("x answer 0", True),
        ("y answer 0", False),
    ]
    assert [(row["chosen"], row["rejected"]) for row in rows.preferences] == [("x answer 0", "y answer 0")]

    rows = make_rows(
        pairs({"x": {"ann": Correction(text="so"), "bob": Correction(text="or so")}}, kind="correction")
    )
    assert sorted(row["response"] for row in rows.demonstrations) == ["or so", "so"]
    assert {row["corrects"] for row in rows.demonstrations} == {"x answer 0"}

    rows = make_rows(pairs({"x": {"ann": Critique(text="too long")}}, kind="critique"))
    assert [(row["response"], row["critique"]) for row in rows.critiques] == [("x answer 0", "too long")]


def test_gold_items_and_items_with_few_votes_give_no_rows():
    items = [item("gold", gold=Choice(choice="a", strength=1)), item("few"), item("none")]
    collection = pairs({"gold": {"ann": "a", "bob": "a"}, "few": {"ann": "a"}}, items=items)
    rows = make_rows(collection, RowRules(min_votes=2))
    assert rows.preferences == []
    assert rows.left_out == {"gold item": 1, "too few votes": 2}
    assert len(make_rows(collection, RowRules(include_gold=True)).preferences) == 2


def test_a_group_of_several_prompts_is_refused():
    items = [item("x", prompt="one", group="g"), item("y", prompt="two", group="g")]
    with pytest.raises(ValueError, match=r"item y: group 'g' holds item x too, whose prompt differs"):
        make_rows(pairs({"x": {"ann": "a"}}, items=items))
