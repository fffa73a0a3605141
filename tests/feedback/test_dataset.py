"""A version of the data set: what goes in with which weight, and that the same votes give the same bytes."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest

from feedback.dataset import Blend, make_dataset, read_manifest
from feedback.history import Votes
from feedback.records import Correction
from feedback.snapshot import SnapshotConfig

from .collections import START, item, pairs, people, project, vote
from .collections import collect as collected

CONFIG = SnapshotConfig(license="CC-BY-4.0")


def votes_of(*collections, new=(), since=3, number=9, at=START + timedelta(days=10)):
    counted = tuple(collection.counted() for collection in collections)
    new_items = frozenset(v.item for c in counted for v in c.votes if v.id in new)
    return Votes("log", number, at, counted, frozenset(new), new_items, since)


def origins(data):
    return {row["items"][0] if "items" in row else row["prompt"]: row["origin"] for row in data.preferences}


TABLE = {"i1": {"ann": "a2"}, "i2": {"ann": "b1"}, "i3": {"ann": "a3"}}
BASE = [
    {"prompt": "base?", "messages": [{"role": "user", "content": "base?"}], "chosen": "x", "rejected": "y"}
]


def test_pairs_with_new_votes_are_new_and_the_others_old():
    votes = votes_of(pairs(TABLE), new={"v-i2-ann-0"})
    data = make_dataset(votes, CONFIG, Blend())
    assert origins(data) == {"i1": "old", "i2": "new", "i3": "old"}
    assert data.manifest["pairs"]["kept"] == {"new": 1, "old": 2, "base": 0}
    assert (data.manifest["votes"], data.manifest["new_votes"]) == (3, 1)
    assert (data.manifest["since_event"], data.manifest["last_event"]) == (3, 9)


def test_weights_say_what_stays_and_base_pairs_do_not_age():
    votes = votes_of(pairs(TABLE), new={"v-i2-ann-0"})
    assert origins(make_dataset(votes, CONFIG, Blend(old=0.0))) == {"i2": "new"}
    only_base = make_dataset(votes, CONFIG, Blend(new=0.0, old=0.0, base=1.0), BASE)
    assert origins(only_base) == {"base?": "base"}
    # Ten days at a half-life of five: a quarter; the base pair is as old as the last event, so whole.
    aged = make_dataset(votes, CONFIG, Blend(base=1.0, half_life_days=5.0, num_rows=4), BASE)
    weights = {row["origin"]: row["weight"] for row in aged.preferences}
    assert weights == pytest.approx({"old": 0.25, "new": 0.25, "base": 1.0})


def test_the_same_votes_in_any_order_give_the_same_bytes_and_another_vote_another_version():
    one = make_dataset(votes_of(pairs(TABLE)), CONFIG, Blend())
    turned = pairs({name: TABLE[name] for name in reversed(TABLE)})
    assert make_dataset(votes_of(turned), CONFIG, Blend()).files == one.files
    other = make_dataset(votes_of(pairs(TABLE | {"i1": {"ann": "b2"}})), CONFIG, Blend())
    assert other.version != one.version


def corrected():
    made = [item("c1", "correction", prompt="what?", texts=["no idea"])]
    said = [vote("c1", "ann", Correction(text="this"), "correction")]
    return collected(project("correction"), made, said, people("ann"))


def test_corrections_become_demonstrations_and_are_filled_up():
    filling = [{"prompt": "p", "messages": [{"role": "user", "content": "p"}], "response": "r"}]
    with_pairs = votes_of(pairs(TABLE))
    assert "demonstrations.jsonl" not in make_dataset(with_pairs, CONFIG, Blend(), (), filling).files
    data = make_dataset(votes_of(corrected()), CONFIG, Blend(), (), filling)
    rows = [json.loads(line) for line in data.files["demonstrations.jsonl"].splitlines()]
    assert [row["response"] for row in rows] == ["this", "r"]
    assert (data.manifest["corrections"], data.manifest["filled_up_with"]) == (1, 1)


def test_a_text_may_hold_any_line_separator():
    prompt = "say\u2028it\x85again"
    votes = votes_of(pairs({"i1": {"ann": "a2"}}, items=[item("i1", prompt=prompt)]))
    assert [row["prompt"] for row in make_dataset(votes, CONFIG, Blend()).preferences] == [prompt]


def test_a_version_is_found_again_whole_or_not_at_all(tmp_path):
    data = make_dataset(votes_of(pairs(TABLE)), CONFIG, Blend())
    assert read_manifest(tmp_path / "feedback") is None
    where = data.write(tmp_path / "feedback")
    assert read_manifest(tmp_path / "feedback") == data.manifest
    assert "3 votes that count" in (where / "README.md").read_text()
    assert (where / "projects" / "p" / "votes.jsonl").is_file()
    again = make_dataset(votes_of(pairs({"i1": {"ann": "a"}})), CONFIG, Blend())
    again.write(tmp_path / "feedback")
    assert read_manifest(tmp_path / "feedback") == again.manifest, "the earlier version is gone"
    changed = tmp_path / "feedback" / again.version / "preferences.jsonl"
    changed.write_text(changed.read_text() + "\n")
    assert read_manifest(tmp_path / "feedback") is None


def test_nothing_that_counts_is_said():
    with pytest.raises(ValueError, match="no vote counts"):
        make_dataset(votes_of(at=None), CONFIG, Blend())
