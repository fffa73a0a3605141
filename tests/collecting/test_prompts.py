"""Which prompts may be asked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.collecting.prompts import ASKED, HELD_OUT, MOVED, TWICE, askable, drawn_key, in_drawn_order
from rlhf_core.data.split import prompt_hash, split_of


def row(text):
    return {"prompt": text, "messages": [{"role": "user", "content": text}], "source": "test"}


def texts_by_side(fraction, count=200):
    """Prompts of each side of the split."""
    sides = {"train": [], "eval": []}
    for i in range(count):
        text = f"how do you like the number {i}?"
        sides[split_of(text, fraction)].append(text)
    return sides


def prompts(kept):
    return {side: [found["prompt"] for found in own] for side, own in kept.items()}


@pytest.mark.parametrize("raw", [False, True])
def test_held_out_prompts_stand_apart_and_are_left_out_where_none_is_wanted(params, raw):
    sides = texts_by_side(params.data.eval_fraction)
    assert 20 < len(sides["eval"]) < 60
    rows = [row(t) for t in sides["eval"] + sides["train"]]
    kept, left_out = askable(rows, params.data, set(), held_out=True, raw=raw)
    assert prompts(kept) == sides
    assert not left_out
    kept, left_out = askable(rows, params.data, set(), held_out=False, raw=raw)
    assert prompts(kept) == {"train": sides["train"], "eval": []}
    assert left_out == {HELD_OUT: len(sides["eval"])}


def test_a_prompt_that_another_split_has_moved_is_not_asked(params):
    """A policy that was trained on it has learnt from what is held out now, and the other way round."""
    sides = texts_by_side(params.data.eval_fraction)
    rows = [row(text) | {"split": then} for own in sides.values() for text, then in zip(own, sides)]
    kept, left_out = askable(rows, params.data, set(), held_out=True)
    assert prompts(kept) == {"train": sides["train"][:1], "eval": sides["eval"][1:2]}
    assert left_out == {MOVED: 2}


@pytest.mark.parametrize("side", ["train", "eval"])
def test_asked_and_repeated_prompts_are_left_out_in_whatever_writing(params, side):
    one, two, three, *_ = texts_by_side(params.data.eval_fraction)[side]
    rows = [row(one), row(two), row(f"  {two.upper()} "), row(three)]
    kept, left_out = askable(rows, params.data, {prompt_hash(one.upper())}, held_out=True)
    assert prompts(kept)[side] == [two, three]
    assert left_out == {ASKED: 1, TWICE: 1}


def test_what_users_wrote_goes_through_the_rules_of_prepare(params):
    fraction = params.data.eval_fraction
    held_in = iter(
        i for i in range(1000) if split_of(f"write to me{i}@example.com please", fraction) == "train"
    )
    personal = f"write to me{next(held_in)}@example.com please"
    short = next(text for text in ("hi", "yo", "hm", "ok", "no") if split_of(text, fraction) == "train")
    good = texts_by_side(fraction)["train"][0]
    kept, left_out = askable(
        [row(personal), row(short), row(good)], params.data, set(), held_out=True, raw=True
    )
    assert prompts(kept) == {"train": [good], "eval": []}
    assert left_out == {"personal data: e-mail address": 1, "prompt is shorter than data.min_prompt_chars": 1}
    kept, _ = askable([row(personal)], params.data, set(), held_out=True)
    assert len(kept["train"]) == 1  # prepared: it was looked at before


@given(st.lists(st.text(max_size=8), unique_by=lambda t: prompt_hash(t)), st.integers(0, 3), st.randoms())
def test_the_order_hangs_on_text_and_seed_alone(texts, seed, shuffler):
    rows = [row(text) for text in texts]
    mixed = list(rows)
    shuffler.shuffle(mixed)
    assert in_drawn_order(mixed, str(seed)) == in_drawn_order(rows, str(seed))


def test_another_seed_is_another_order():
    rows = [row(f"question {i}") for i in range(20)]
    assert in_drawn_order(rows, "0/0") != in_drawn_order(rows, "0/1")
    assert drawn_key("0", "A  question") == drawn_key("0", "a question")
