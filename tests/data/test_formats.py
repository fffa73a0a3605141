import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.data.formats import RowError, clean, detect_kind, to_row, to_rows
from rlhf_core.data.rows import KINDS
from rlhf_core.data.split import normalise


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "how are you?", "response": "well"},
        {"prompt": [user("how are you?")], "response": "well"},
        {"prompt": [user("how are you?")], "response": [assistant("well")]},
        {"messages": [user("how are you?"), assistant("well")]},
        {"messages": json.dumps([user("how are you?"), assistant("well")])},
        {"messages": [user("how are you?")], "response": "well"},
    ],
)
def test_all_forms_of_a_demonstration_are_one_row(values):
    row = to_row(values, "demonstrations")
    assert row == {"prompt": "how are you?", "messages": [user("how are you?")], "response": "well"}


def test_a_conversation_keeps_its_turns():
    turns = [{"role": "system", "content": "be kind"}, user("hi"), assistant("hello"), user("and you?")]
    row = to_row({"messages": [*turns, assistant("fine")]}, "demonstrations")
    assert row["messages"] == turns
    assert row["prompt"] == "system: be kind\nuser: hi\nassistant: hello\nuser: and you?"
    assert row["response"] == "fine"


@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: [assistant(t)], lambda t: json.dumps([assistant(t)])]
)
def test_preferences_in_all_forms(wrap):
    row = to_row(
        {"prompt": "hi", "chosen": wrap("good"), "rejected": wrap("bad"), "margin": "2"}, "preferences"
    )
    assert (row["chosen"], row["rejected"], row["margin"]) == ("good", "bad", 2.0)


def test_missing_margin_is_not_a_number():
    assert math.isnan(to_row({"prompt": "hi", "chosen": "a", "rejected": "b"}, "preferences")["margin"])


def test_prompts_drop_the_answer_of_a_conversation():
    assert to_row({"messages": [user("hi"), assistant("yo")]}, "prompts")["messages"] == [user("hi")]


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("prompts", {"question": "x"}, "needs a column prompt .or messages.; found question"),
        ("prompts", {}, "found none"),
        ("prompts", {"prompt": 7}, "prompt must be a text or a list of messages, found int"),
        ("prompts", {"prompt": []}, "found list"),
        ("prompts", {"prompt": [{"role": "user"}]}, "each message needs a role and a content text"),
        ("prompts", {"prompt": [{"role": "bot", "content": "x"}]}, "role 'bot' must be one of system, user"),
        ("prompts", {"prompt": [assistant("x")]}, "must end with a user's turn"),
        ("demonstrations", {"prompt": "x"}, "needs a column response; found prompt"),
        ("demonstrations", {"messages": [user("x")]}, "must end with the assistant's turn"),
        ("preferences", {"prompt": "x", "chosen": "y"}, "needs a column rejected"),
        ("preferences", {"prompt": "x", "chosen": [user("y")], "rejected": "z"}, "chosen must end with"),
        ("preferences", {"prompt": "x", "chosen": "y", "rejected": "z", "margin": "big"}, "margin 'big'"),
        ("preferences", {"prompt": "x", "chosen": "y", "rejected": "z", "probability": 0.3}, "swap chosen"),
        (
            "preferences",
            {"prompt": "x", "chosen": "y", "rejected": "z", "probability": 7},
            "0.5 .a tie. to 1",
        ),
    ],
)
def test_bad_row_is_told_with_its_fault(kind, values, message):
    with pytest.raises(RowError, match=message):
        to_row(values, kind)


def test_clean_by_hand():
    assert clean("it&#39;s\u200b  so \t nice\r\n\r\n  here\x00") == "it's so nice\nhere"


@given(st.text())
def test_cleaned_text_has_no_control_characters_and_no_loose_space(text):
    cleaned = clean(text)
    assert "\x00" not in cleaned
    assert "\u200b" not in cleaned
    assert all(line == " ".join(line.split()) and line for line in cleaned.split("\n") if cleaned)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3)
    ),
    max_leaves=8,
)
columns = st.sampled_from(
    ["prompt", "messages", "response", "chosen", "rejected", "margin", "probability", "other"]
)


@given(
    st.dictionaries(columns, json_values, max_size=4),
    st.sampled_from(KINDS),
)
def test_any_row_becomes_a_row_or_a_row_error(values, kind):
    try:
        row = to_row(values, kind)
    except RowError:
        return
    assert row["messages"][-1]["role"] == "user"
    assert isinstance(row["prompt"], str)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"prompt": "x"}, "prompts"),
        ({"prompt": "x", "response": "y"}, "demonstrations"),
        ({"messages": [user("x")]}, "prompts"),
        ({"messages": [user("x"), assistant("y")]}, "demonstrations"),
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, "preferences"),
    ],
)
def test_kind_is_read_off_the_columns(values, kind):
    assert detect_kind(values) == kind


@given(st.dictionaries(columns, json_values, max_size=4))
def test_kind_of_any_row_is_found_without_a_crash(values):
    assert detect_kind(values) in KINDS


@given(st.text())
def test_normalised_text_is_a_fixed_point_under_case_and_space(text):
    assert normalise(f"  {text}\n") == normalise(text)


def pairs(**values):
    return [
        (row["chosen"], row["rejected"], row["margin"])
        for row in to_rows({"prompt": "hi", **values}, "preferences")
    ]


def test_a_ranking_gives_every_pair_the_best_first():
    found = pairs(responses=["a", "b", "c"])
    assert [pair[:2] for pair in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert all(math.isnan(pair[2]) for pair in found)


def test_ratings_give_pairs_with_margins_and_equal_ones_are_ties():
    found = to_rows({"prompt": "hi", "responses": ["a", "b", "c"], "ratings": [1, "4.5", 1]}, "preferences")
    names = ("chosen", "rejected", "probability", "margin", "chosen_score", "rejected_score")
    assert [tuple(row[name] for name in names) for row in found] == [
        ("b", "a", 1.0, 3.5, 4.5, 1.0),
        ("b", "c", 1.0, 3.5, 4.5, 1.0),
        ("a", "c", 0.5, 0.0, 1.0, 1.0),
    ]


def test_a_label_may_be_soft_or_a_tie():
    row = {"prompt": "hi", "chosen": "a", "rejected": "b"}
    assert to_row(row, "preferences")["probability"] == 1.0
    assert to_row(row | {"probability": "0.75"}, "preferences")["probability"] == 0.75
    assert to_row(row | {"probability": 0.5}, "preferences")["probability"] == 0.5


def test_a_ranking_may_be_json_in_a_csv_cell_or_hold_messages():
    assert pairs(responses='["a", "b"]', ratings="[1, 2]") == [("b", "a", 1.0)]
    assert pairs(responses=[[assistant("a")], [assistant("b")]])[0][:2] == ("a", "b")
    assert detect_kind({"prompt": "hi", "responses": ["a", "b"]}) == "preferences"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"responses": "a"}, "responses must be a list"),
        ({"responses": ["a"]}, "at least 2 answers, found 1"),
        ({"responses": ["a", "b"], "ratings": [1]}, "1 and 2"),
        ({"responses": ["a", "b"], "ratings": [1, "high"]}, "rating 'high' must be a number"),
    ],
)
def test_a_broken_ranking_says_how(values, message):
    with pytest.raises(RowError, match=message):
        pairs(**values)


@given(st.lists(st.tuples(st.text("xyz", min_size=1), st.integers(1, 5)), min_size=2, max_size=6))
def test_pairs_of_a_ranking_do_not_depend_on_its_order(rated):
    def found(items):
        texts, ratings = zip(*items)
        values = {"prompt": "hi", "responses": list(texts), "ratings": list(ratings)}
        rows = to_rows(values, "preferences")
        decided = [row for row in rows if row["probability"] == 1.0]
        return sorted((row["chosen"], row["rejected"], row["margin"]) for row in decided)

    assert found(rated) == found(rated[::-1])
    assert len(found(rated)) == sum(
        a > b for i, (_, a) in enumerate(rated) for j, (_, b) in enumerate(rated) if i != j
    )
