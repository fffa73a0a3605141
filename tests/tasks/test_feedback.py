"""A flow asks people and takes their votes away."""

from __future__ import annotations

import json

import pytest

from feedback import accounts, assignment
from feedback.formats.jsonl import read_collection
from feedback.records import Choice
from feedback.store import Store
from rlhf_core.errors import InputError
from tasks.feedback import ask_people, collect_votes

PROJECT = {"id": "tone", "name": "Tone", "kind": "pairwise", "gold_share": 0.0}


def rows(path, *prompts):
    lines = [json.dumps({"prompt": prompt, "responses": ["a", "b"]}) for prompt in prompts]
    path.write_text("\n".join(lines))
    return path


def test_items_are_asked_once_and_votes_come_back_whole(tmp_path):
    database = str(tmp_path / "f.db")
    assert ask_people.fn(database, PROJECT, rows(tmp_path / "q.jsonl", "one", "two")) == 2
    assert ask_people.fn(database, PROJECT, rows(tmp_path / "q.jsonl", "two", "three")) == 1
    store = Store(database)
    ann, _ = accounts.add_annotator(store, "system", "ann")
    shown = assignment.next_item(store, ann, "tone")
    assignment.cast_vote(store, ann, shown.item.id, "k", Choice(choice="b", strength=1), 2.0)
    store.close()
    assert collect_votes.fn(database, "tone", tmp_path / "out" / "tone.jsonl") == 1
    found = read_collection(tmp_path / "out" / "tone.jsonl")
    assert {item.prompt for item in found.items} == {"one", "two", "three"}
    assert found.votes[0].value == Choice(choice="b", strength=1)


def test_what_is_wrong_is_named(tmp_path):
    database = str(tmp_path / "f.db")
    with pytest.raises(InputError, match="a rating project has some"):
        ask_people.fn(database, PROJECT | {"kind": "rating"}, rows(tmp_path / "q.jsonl", "one"))
    (tmp_path / "q.jsonl").write_text('{"prompt": "one", "responses": ["a"]}')
    with pytest.raises(InputError, match=r"q\.jsonl: line 1.*2 responses, found 1"):
        ask_people.fn(database, PROJECT, tmp_path / "q.jsonl")
    with pytest.raises(InputError, match="no project 'tone'"):
        collect_votes.fn(database, "tone", tmp_path / "out.jsonl")
