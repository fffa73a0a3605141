"""Weights and ages by hand, and what a merge promises."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.merge import Source, merge

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def row(number, days=0.0, **more):
    at = (NOW - timedelta(days=days)).isoformat()
    return {"prompt": f"q{number}", "chosen": f"good {number}", "rejected": f"bad {number}", "at": at} | more


def weights(merged):
    return {one["prompt"]: one["weight"] for one in merged.rows}


def test_weights_by_hand():
    old = Source("old", [row(1, days=60), row(2, days=0)], weight=2.0)
    new = Source(
        "new", [row(3, days=30), {name: text for name, text in row(4).items() if name != "at"}], at=NOW
    )
    merged = merge([old, new], now=NOW, half_life_days=30.0, num_rows=10)
    assert weights(merged) == {"q1": 0.5, "q2": 2.0, "q3": 0.5, "q4": 1.0}
    assert merged.kept == {"old": 2, "new": 2}
    assert set(weights(merge([old], now=NOW, half_life_days=None, num_rows=9)).values()) == {2.0}


def test_of_two_judgements_on_the_same_answers_the_newest_stays():
    swapped = row(1, days=1, chosen="bad 1", rejected="good 1")
    merged = merge([Source("old", [row(1, days=50)]), Source("new", [swapped])], now=NOW, half_life_days=None)
    assert [one["chosen"] for one in merged.rows] == ["bad 1"]
    assert merged.superseded == {"old": 1, "new": 0}
    assert merged.rows[0]["origin"] == "new"


def test_without_a_number_of_rows_weights_are_chances():
    rows = [row(n) for n in range(4000)]
    merged = merge([Source("s", rows, weight=0.3)], now=NOW, half_life_days=None, seed=1)
    assert abs(len(merged.rows) / 4000 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 4000)
    assert merged.kept["s"] + merged.not_drawn["s"] == 4000
    assert len(merge([Source("s", rows, weight=1.0)], now=NOW, half_life_days=None).rows) == 4000
    assert merge([Source("s", rows, weight=0.0)], now=NOW, half_life_days=None).rows == []


def test_with_a_number_of_rows_heavy_rows_come_more_often():
    # One draw without replacement of two sources of equal size: the chance is w / (w + v) = 3 / 4.
    heavy = [Source("heavy", [row(1)], weight=3.0), Source("light", [row(2)], weight=1.0)]
    drawn = [
        merge(heavy, now=NOW, half_life_days=None, num_rows=1, seed=seed).kept["heavy"]
        for seed in range(2000)
    ]
    assert abs(sum(drawn) / 2000 - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 2000)


sources = st.lists(
    st.tuples(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 90)), max_size=6), st.floats(0.0, 3.0)),
    min_size=1,
    max_size=3,
)


@settings(deadline=None)
@given(sources, st.randoms(use_true_random=False), st.none() | st.integers(1, 8), st.integers(0, 3))
def test_the_merge_does_not_depend_on_the_order(found, rng, num_rows, seed):
    made = [Source(f"s{n}", [row(*one) for one in rows], weight) for n, (rows, weight) in enumerate(found)]
    turned = [Source(one.name, rng.sample(list(one.rows), len(one.rows)), one.weight) for one in made]
    rng.shuffle(turned)
    options = {"now": NOW, "half_life_days": 30.0, "num_rows": num_rows, "seed": seed}
    merged = merge(made, **options)
    assert merge(turned, **options) == merged
    total = sum(map(len, (one.rows for one in made)))
    assert sum(sum(own.values()) for own in (merged.kept, merged.superseded, merged.not_drawn)) == total
    assert num_rows is None or len(merged.rows) <= num_rows


def test_a_set_that_grows_keeps_its_sample():
    rows = [row(n) for n in range(300)]
    options = {"now": NOW, "half_life_days": None, "seed": 2}
    before = weights(merge([Source("s", rows[:200], weight=0.4)], **options))
    after = weights(merge([Source("s", rows, weight=0.4)], **options))
    assert set(before) == {name for name in after if int(name[1:]) < 200}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Source("s", [], weight=-1.0), "source s: weight"),
        (lambda: merge([], now=NOW, half_life_days=0.0), "half_life_days .0.0. must be above 0"),
        (lambda: merge([], now=NOW, half_life_days=None, num_rows=0), "num_rows .0. must be at least 1"),
        (lambda: merge([Source("s", []), Source("s", [])], now=NOW, half_life_days=None), "different names"),
        (
            lambda: merge([Source("s", [row(1), {"prompt": "q"}], at=NOW)], now=NOW, half_life_days=None),
            "source s: row 2: chosen: is missing",
        ),
        (
            lambda: merge([Source("s", [{"prompt": "q"}])], now=NOW, half_life_days=None),
            "source s: row 1: at: is missing",
        ),
        (
            lambda: merge([Source("s", [row(1) | {"at": "today"}])], now=NOW, half_life_days=None),
            "row 1: at: 'today'; must be a time in ISO 8601",
        ),
        (
            lambda: merge([Source("s", [row(1) | {"at": "2026-01-01"}])], now=NOW, half_life_days=None),
            "must have an offset from UTC",
        ),
    ],
)
def test_bad_input_names_source_row_and_rule(call, message):
    with pytest.raises(ValueError, match=message):
        call()
