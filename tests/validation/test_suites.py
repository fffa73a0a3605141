"""Each rule against data with the defect it is there for, through Great Expectations itself."""

import pytest

from rlhf_core.validation.columns import derive
from rlhf_core.validation.expectations import MAX_ROWS, check
from rlhf_core.validation.html import render
from rlhf_core.validation.suites import suite


def count_words(texts):
    return [len(text.split()) for text in texts]


def pairs(count=30):
    """Clean pairs; in half of them the chosen answer is the longer one."""
    return [
        {
            "prompt": f"question {i}?",
            "chosen": f"answer {i}" + " indeed" * (i % 2),
            "rejected": f"no {i}" + " indeed" * (1 - i % 2),
            "probability": 1.0,
            "source": "mine.jsonl",
            "row": i + 1,
        }
        for i in range(count)
    ]


def outcomes(rows, config, kind="preferences", split="train", other_prompts=frozenset()):
    frame = derive(rows, kind, count_words, set(other_prompts))
    return check(frame, suite(kind, split, config), "test")


def failed(found):
    return {(o.rule.column, o.rule.severity) for o in found if not o.passed}


@pytest.fixture
def config(params):
    return params.validate_


def test_clean_pairs_pass_every_rule(config):
    assert failed(outcomes(pairs(), config)) == set()


@pytest.mark.parametrize(
    ("change", "column", "severity"),
    [
        ({"prompt": " \n"}, "prompt_blank", "critical"),
        ({"chosen": ""}, "chosen_blank", "critical"),
        ({"prompt": "word " * 129}, "prompt_tokens", "critical"),
        ({"rejected": "word " * 257}, "rejected_tokens", "critical"),
        ({"chosen": "Same  answer", "rejected": "same answer"}, "same_answer", "critical"),
        ({"prompt": "QUESTION  3?"}, "leaks", "critical"),
        ({"probability": 0.25}, "probability", "critical"),
    ],
)
def test_one_bad_row_is_found_and_named(config, change, column, severity):
    rows = pairs()
    rows[7] |= change
    found = outcomes(rows, config, other_prompts={"question 3?"} if column == "leaks" else set())
    if column == "leaks":
        rows = [row for row in rows if row["row"] != 4]
        found = outcomes(rows, config, other_prompts={"question 3?"})
    assert failed(found) == {(column, severity)}
    (bad,) = (o for o in found if not o.passed)
    assert bad.num_bad == 1
    assert [(r["source"], r["row"]) for r in bad.bad_rows] == [("mine.jsonl", 8)]


def test_token_limits_are_inclusive(config):
    rows = pairs()
    rows[0] |= {"prompt": "word " * 128, "chosen": "word " * 256}
    assert failed(outcomes(rows, config)) == set()


def test_duplicates_are_counted_against_their_share(config):
    rows = pairs(40)
    assert failed(outcomes([*rows, rows[0] | {"row": 99}], config)) == set()  # 1 of 41 is below 5 %
    assert failed(outcomes(rows + rows[:3], config)) == {("duplicate", "warning")}


def test_contradiction_is_a_warning(config):
    rows = pairs()
    turned = rows[0] | {"chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"], "row": 31}
    assert failed(outcomes([*rows, turned], config)) == {("contradicts", "warning")}


def test_labels_that_follow_length_are_a_warning(config):
    rows = [row for row in pairs(60) if len(row["chosen"]) > len(row["rejected"])]
    assert failed(outcomes(rows, config)) == {("longer_chosen", "warning")}


def test_too_few_rows(config):
    rows = [row | {"response": "fine"} for row in pairs(19)]
    found = outcomes(rows, config, "demonstrations")
    assert [(o.rule.expectation, o.observed) for o in found if not o.passed] == [
        ("ExpectTableRowCountToBeBetween", "19")
    ]
    assert failed(outcomes(rows, config, "demonstrations", "eval")) == set()


def test_ties_do_not_count_as_a_liking_for_length(config):
    rows = [row | {"chosen": row["chosen"] + " and more", "probability": 0.5} for row in pairs()]
    assert failed(outcomes(rows, config)) == set()


def test_missing_column_is_critical(config):
    rows = pairs()
    frame = derive(rows, "preferences", count_words, set()).drop(columns=["rejected"])
    found = check(frame, suite("preferences", "train", config), "test")
    assert failed(found) == {("rejected", "critical")}


def test_shown_rows_are_bounded_and_the_count_is_not(config):
    rows = [row | {"chosen": " "} for row in pairs(50)]
    (bad,) = (o for o in outcomes(rows, config) if o.rule.column == "chosen_blank")
    assert bad.num_bad == 50
    assert len(bad.bad_rows) == MAX_ROWS


def test_page_escapes_what_rows_say(config):
    rows = pairs()
    rows[0] |= {"chosen": "<script>alert(1)</script>", "rejected": "<script>alert(1)</script>"}
    page = render({"preferences/train": outcomes(rows, config)}, {"rows": 30})
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "not fit to train on" in page
    assert "mine.jsonl:1" in page
