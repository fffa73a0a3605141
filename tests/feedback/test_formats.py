"""Each form there and back, and what a malformed file is told."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.collection import collect
from feedback.formats import argilla, jsonl, label_studio, trl
from feedback.formats.reading import FormatError
from feedback.records import Annotator, Ranking
from feedback.rows import make_rows
from tests.feedback.collections import KINDS, START, TEXTS, choice, collections, item, pairs, project


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A function that writes a text to a file, the same one each time."""
    path = tmp_path_factory.mktemp("forms") / "given.json"

    def write(text):
        path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
        return path

    return write


@settings(deadline=None)
@given(collections())
def test_records_come_back_whole(place, collection):
    assert jsonl.read_collection(place(jsonl.write_collection(collection))) == collection


def without_sides(votes):
    return [(one.id, one.item, one.annotator, one.value, one.seconds, one.at) for one in votes]


@settings(deadline=None)
@given(collections(), st.booleans())
def test_label_studio_gives_back_items_and_votes(place, collection, lines):
    tasks = label_studio.tasks(collection)
    text = "\n".join(map(json.dumps, tasks)) if lines else json.dumps(tasks, indent=1)
    found = label_studio.read_annotations(place(text), collection.project)
    counted = collection.counted()
    assert tuple(found.items) == counted.items
    assert sorted(without_sides(found.votes)) == sorted(without_sides(counted.votes))
    assert set(found.annotators) == {vote.annotator for vote in counted.votes}


def untied(value):
    """Argilla's rankings hold no ties."""
    if not isinstance(value, Ranking):
        return value
    order = sorted(range(len(value.ranks)), key=lambda i: (value.ranks[i], i))
    return Ranking(ranks=tuple(order.index(i) + 1 for i in range(len(order))))


@settings(deadline=None)
@given(collections())
def test_argilla_gives_back_items_and_values(place, collection):
    found = argilla.read_records(place(argilla.records(collection)), collection.project, START)
    counted = collection.counted()
    assert [one.model_copy(update={"gold": None}) for one in counted.items] == found.items
    expected = {(one.item, argilla.user_id(one.annotator)): untied(one.value) for one in counted.votes}
    assert {(one.item, one.annotator): one.value for one in found.votes} == expected
    collect(collection.project, found.items, found.votes, found.annotators.values())


@settings(deadline=None)
@given(collections(kinds=st.just("pairwise"), gold=False), st.booleans())
def test_trl_preferences_come_back_as_they_were(place, collection, conversational):
    rows = [row for row in make_rows(collection).preferences if row["probability"] > 0.5]
    if not rows:
        return
    labeller = trl.Labeller(Annotator(id="old", name="old set"), START)
    path = place("\n".join(map(json.dumps, trl.preference(rows, conversational=conversational))))
    found = trl.read_rows(path, collection.project, labeller)
    again = collect(collection.project, found.items, found.votes, found.annotators.values())

    def judged(rows):
        return {(row["prompt"], row["chosen"], row["rejected"]) for row in rows}

    # Contradicting rows about the same answers are one item, on which one annotator has one last vote.
    pairs_of_texts = [(row["prompt"], frozenset((row["chosen"], row["rejected"]))) for row in rows]
    if len(set(pairs_of_texts)) == len(pairs_of_texts):
        assert judged(make_rows(again).preferences) == judged(rows)


@settings(deadline=None)
@given(
    st.lists(st.tuples(TEXTS, TEXTS, st.booleans()), min_size=1, max_size=4, unique_by=lambda row: row[:2])
)
def test_trl_labels_come_back_as_they_were(place, rows):
    given_rows = [{"prompt": p, "completion": c, "label": good} for p, c, good in rows]
    labeller = trl.Labeller(Annotator(id="old", name="old set"), START)
    found = trl.read_rows(place("\n".join(map(json.dumps, given_rows))), project("label"), labeller)
    collection = collect(project("label"), found.items, found.votes, found.annotators.values())
    out = trl.unpaired_preference(make_rows(collection).labels, conversational=False)
    assert sorted(out, key=str) == sorted(given_rows, key=str)


def test_trl_forms_by_hand(place):
    user, good, bad = (
        {"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "g"), ("assistant", "b"))
    )
    implicit = [{"chosen": [user, good], "rejected": [user, bad]}]
    explicit = [{"prompt": [user], "chosen": [good], "rejected": [bad]}]
    plain = [{"prompt": "q", "chosen": "g", "rejected": "b"}]
    labeller = trl.Labeller(Annotator(id="old", name="old set"), START)
    found = [trl.read_rows(place(rows), project(), labeller) for rows in (implicit, explicit, plain)]
    assert found[0] == found[1] == found[2]
    (one,), (vote,) = found[0].items, found[0].votes
    assert one.prompt == "q"
    assert one.responses["ab".index(vote.value.choice)].text == "g"
    rows = make_rows(pairs({"i1": {"ann": "tie"}, "i2": {"ann": "b3"}})).preferences
    assert trl.preference(rows) == [
        {
            "prompt": [{"role": "user", "content": "question i2?"}],
            "chosen": [{"role": "assistant", "content": "i2 answer 1"}],
            "rejected": [{"role": "assistant", "content": "i2 answer 0"}],
            "margin": 3.0,
        }
    ]


def test_which_answer_is_a_does_not_tell_which_was_chosen(place):
    rows = [{"prompt": f"q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(60)]
    found = trl.read_rows(place(rows), project(), trl.Labeller(Annotator(id="old", name="old"), START))
    assert 15 < sum(vote.value.choice == "a" for vote in found.votes) < 45


def test_label_studio_as_it_exports_it(place):
    """A task as Label Studio writes it: numbers for people, left and right, a cancelled annotation."""
    task = {
        "id": 7,
        "data": {"question": "Which?", "text1": "one", "text2": "two"},
        "predictions": [],
        "annotations": [
            {
                "id": 1001,
                "completed_by": 10,
                "result": [
                    {
                        "from_name": "pw",
                        "to_name": "text1,text2",
                        "type": "pairwise",
                        "value": {"selected": "right"},
                    }
                ],
                "was_cancelled": False,
                "ground_truth": False,
                "created_at": "2021-03-09T22:16:08.728353Z",
                "lead_time": 4.288,
            },
            {"id": 1002, "completed_by": 11, "result": [], "was_cancelled": True},
        ],
    }
    names = {"prompt": "question", "response_a": "text1", "response_b": "text2", "choice": "pw"}
    found = label_studio.read_annotations(place([task]), project(), names)
    (one,), (vote,) = found.items, found.votes
    assert (one.id, one.prompt, [response.text for response in one.responses]) == (
        "ls-7",
        "Which?",
        ["one", "two"],
    )
    assert (vote.annotator, vote.value, vote.seconds, vote.sides) == ("ls-10", choice("b1"), 4.288, ())
    assert vote.at.isoformat() == "2021-03-09T22:16:08.728353+00:00"
    assert found.left_out == {"cancelled annotation": 1}


def test_rankers_without_buckets_are_read_too(place):
    collection = pairs({"i1": {"ann": Ranking(ranks=(3, 1, 2))}}, kind="ranking")
    tasks = label_studio.tasks(collection)
    tasks[0]["annotations"][0]["result"][0]["value"]["ranker"] = ["1", "2", "0"]
    found = label_studio.read_annotations(place(tasks), collection.project)
    assert found.votes[0].value == Ranking(ranks=(3, 1, 2))


@settings(deadline=None)
@given(KINDS)
def test_the_labelling_configuration_is_xml_with_the_controls_that_are_read(kind):
    names = {
        one.get("name") for one in ElementTree.fromstring(label_studio.label_config(project(kind))).iter()
    }
    wanted = {
        "pairwise": {"choice", "verdict", "strength"},
        "ranking": {"ranking"},
        "rating": {"tone", "truth"},
        "label": {"label"},
        "critique": {"critique"},
        "correction": {"correction"},
    }
    assert wanted[kind] <= names


def test_items_to_put_to_people(place):
    rows = [
        {"prompt": "q", "responses": ["x", {"text": "y", "policy": "new"}], "policies": ["old", "newer"]},
        {"messages": [{"role": "user", "content": "r"}], "responses": ["x", "y"], "id": "mine", "group": "g"},
    ]
    first, second = jsonl.read_items(place(rows), project()).items
    assert [response.policy for response in first.responses] == ["old", "newer"]
    assert (second.id, second.prompt, second.group) == ("mine", "r", "g")
    assert jsonl.read_items(place(rows), project()).items == [first, second]


def as_lines(*rows):
    return "\n".join(json.dumps(row) for row in rows)


RECORD = {"record": "project", "id": "p", "name": "Tone", "kind": "pairwise"}
GOOD = {"prompt": "q", "responses": ["x", "y"]}


@pytest.mark.parametrize(
    ("text", "line", "key", "rule"),
    [
        ("", 1, "", "the file is empty"),
        (json.dumps(GOOD) + json.dumps(GOOD), 1, "", "a line must hold one JSON object"),
        (as_lines(GOOD) + '\n{"prompt": "q"', 2, "", "not JSON: Expecting ',' delimiter"),
        (as_lines(GOOD, 7), 2, "", "7; must be a JSON object"),
        ('[\n{"prompt": "q", "responses": ["x", "y"]},\n{"prompt" 1}]', 3, "", "not JSON"),
        ('[\n{"prompt": "q", "responses": ["x", "y"]}\n', 3, "", "is it truncated"),
        ('[{"prompt": "q", "responses": ["x", "y"]}]\n\nmore', 3, "", "nothing may follow"),
        ('{"prompt": "q", "prompt": "r"}', 1, "", "the key 'prompt' stands twice"),
        ('{"prompt": NaN}', 1, "", "NaN is no JSON number"),
        (as_lines(GOOD, {"responses": ["x", "y"]}), 2, "prompt", "is missing"),
        (
            as_lines({"prompt": 7, "responses": ["x", "y"]}),
            1,
            "prompt",
            "7; must be a text or a list of messages",
        ),
        (
            as_lines({"prompt": [{"role": "bot", "content": "x"}]}),
            1,
            "prompt.0.role",
            "'bot'; Input should be",
        ),
        (as_lines({"prompt": "q", "responses": "x"}), 1, "responses", "'x'; must be a list"),
        (as_lines({"prompt": "q", "responses": ["x", 8]}), 1, "responses.1", "8; Input should be"),
        (as_lines({"prompt": "q", "responses": ["x"]}), 1, "", "has 2 responses, found 1"),
        (as_lines(GOOD | {"policies": ["m"]}), 1, "policies", "must be as long as responses, 2"),
        (as_lines(GOOD | {"prefered": "x"}), 1, "prefered", "unknown key"),
        (as_lines(GOOD | {"id": "a b"}), 1, "id", "'a b'; String should match pattern"),
        (as_lines(GOOD | {"id": "i"}, GOOD | {"id": "i"}), 2, "id", "stands in line 1 already"),
    ],
)
def test_malformed_items_name_line_key_and_rule(place, text, line, key, rule):
    path = place(text)
    with pytest.raises(FormatError) as caught:
        jsonl.read_items(path, project())
    assert (caught.value.line, caught.value.key) == (line, key)
    assert rule in str(caught.value)
    assert str(caught.value).startswith(f"{path}: line {line}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (as_lines(RECORD, {"record": "ballot"}), "line 2: record: 'ballot'; must be one of project, item"),
        (as_lines(RECORD | {"kind": "duel"}), "line 1: kind: 'duel'; Input should be"),
        (as_lines(RECORD, RECORD), "there must be one project, found 2"),
        (as_lines(RECORD | {"colour": 1}), "line 1: colour: 1; Extra inputs are not permitted"),
        (
            as_lines(RECORD, {"record": "annotator", "id": "ann", "name": " "}),
            "line 2: name: ' '; String should match pattern",
        ),
    ],
)
def test_malformed_records_name_line_key_and_rule(place, text, message):
    with pytest.raises(ValueError, match=r"given\.json") as caught:
        jsonl.read_collection(place(text))
    assert message in str(caught.value)


def test_records_that_do_not_fit_together_are_refused(place):
    text = jsonl.write_collection(pairs({"i1": {"ann": "a"}}))
    with pytest.raises(ValueError, match="vote v-i1-ann-0: item 'i1' is not in the project"):
        jsonl.read_collection(place("\n".join(x for x in text.split("\n") if '"record": "item"' not in x)))
    with pytest.raises(ValueError, match="vote v-i1-ann-0: annotator 'ann' is not known"):
        jsonl.read_collection(place("\n".join(x for x in text.split("\n") if '"annotator", ' not in x)))


def broken(tasks, *path, value):
    inner = tasks[0]
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return tasks


RESULT = ("annotations", 0, "result", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("data",), [], "line 1: data: []; must be the object"),
        (("data", "response_b"), 3, "line 1: data.response_b: 3; must be a text"),
        (("annotations",), {}, "line 1: annotations: {}; must be a list"),
        (("annotations", 0, "result"), None, "line 1: annotations.0.result: is missing"),
        (RESULT, {}, "line 1: annotations.0.result.0: {}; must have from_name"),
        ((*RESULT, "value", "selected"), "up", "annotations.0.result: 'up' must be one of left, right"),
        ((*RESULT, "from_name"), "pw", "annotations.0.result: no result of 'choice', found pw, strength"),
        (("annotations", 0, "created_at"), None, "annotations.0.created_at: None; must be a time"),
        (("annotations", 0, "created_at"), "today", "line 1: annotations.0.at: 'today'; Input should be"),
        (
            ("annotations", 0, "completed_by"),
            True,
            "annotations.0.completed_by: True; must be a user's number",
        ),
    ],
)
def test_malformed_label_studio_names_line_key_and_rule(place, path, value, message):
    tasks = broken(label_studio.tasks(pairs({"i1": {"ann": "a"}})), *path, value=value)
    with pytest.raises(FormatError) as caught:
        label_studio.read_annotations(place(tasks), project())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("fields",), None, "line 1: fields: None; must be the object"),
        (("fields", "response_a"), None, "line 1: fields.response_a.text: None; Input should be"),
        (("id",), 4, "line 1: id: 4; must be a text"),
        (("responses",), [], ""),
        (("responses", "choice"), [{"value": "a"}], "responses.choice.0: {'value': 'a'}; must be an object"),
        (("responses", "choice", 0, "value"), "c", "choice.choice: 'c'; Input should be 'a', 'b'"),
        (("metadata", "response_a_decoding"), "{", "line 1: metadata.response_a_decoding: Expecting"),
    ],
)
def test_malformed_argilla_names_line_key_and_rule(place, path, value, message):
    records = broken(argilla.records(pairs({"i1": {"ann": "a"}})), *path, value=value)
    if not message:
        assert argilla.read_records(place(records), project(), START).votes == []
        return
    with pytest.raises(FormatError) as caught:
        argilla.read_records(place(records), project(), START)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "x"}, "line 1: rejected: is missing; must be a text"),
        ({"chosen": "x", "rejected": "y"}, "line 1: prompt: is missing; only conversational rows"),
        (
            {"chosen": [{"role": "user", "content": "q"}], "rejected": [{"role": "user", "content": "r"}]},
            "line 1: rejected: must have the turns of chosen",
        ),
        (
            {"prompt": "q", "chosen": [{"role": "user", "content": "x"}], "rejected": "y"},
            "line 1: chosen: ends with a turn of 'user'",
        ),
    ],
)
def test_malformed_trl_names_line_key_and_rule(place, row, message):
    with pytest.raises(FormatError) as caught:
        trl.read_rows(place(as_lines(row)), project())
    assert message in str(caught.value)


def test_forms_without_a_chat_or_a_ranking_say_so(place):
    for call in (label_studio.label_config, argilla.questions):
        with pytest.raises(ValueError, match="has no form for a chat project"):
            call(project("chat"))
    with pytest.raises(ValueError, match="no data set type for a ranking"):
        trl.read_rows(place(as_lines(GOOD)), project("ranking"))


def test_an_item_of_another_kind_is_refused():
    with pytest.raises(
        ValueError, match="item i1: is a ranking item of project p; this is the pairwise project p"
    ):
        collect(project(), [item("i1", "ranking")])
