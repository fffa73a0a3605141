"""What a snapshot promises: the same bytes, no trace, no torn group, rows that the pipeline reads."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.collection import collect
from feedback.formats.jsonl import write_collection
from feedback.records import Choice, Correction, Ratings
from feedback.rows import RowRules, group_of, make_rows
from feedback.snapshot import SnapshotConfig, check_snapshot, make_snapshot, write_snapshot
from rlhf_core.data.formats import to_rows
from rlhf_core.data.sources import read_file
from rlhf_core.data.split import split_of
from tests.feedback.collections import (
    START,
    collections,
    item,
    pairs,
    people,
    project,
    vote,
)

CONFIG = SnapshotConfig(license="CC-BY-4.0", num_samples=10)
RULES = st.builds(
    RowRules,
    consensus=st.just("majority"),
    ties=st.sampled_from(["keep", "drop", "soften"]),
    disputed=st.sampled_from(["keep", "drop"]),
    include_gold=st.booleans(),
    min_votes=st.integers(1, 2),
)


def shuffled(collection, rng):
    parts = [
        list(part)
        for part in (collection.items, collection.votes, collection.annotators, collection.decisions)
    ]
    for part in parts:
        rng.shuffle(part)
    return collect(collection.project, *parts)


def files(collection, config=CONFIG):
    """The files of the snapshot, None when no vote counts."""
    counted = collection.counted()
    if not counted.votes and not counted.decisions:
        return None
    return make_snapshot(collection, config).files


@settings(deadline=None, max_examples=60)
@given(collections(), RULES, st.randoms(use_true_random=False))
def test_the_bytes_do_not_depend_on_the_order_of_records(collection, rules, rng):
    config = CONFIG.model_copy(update={"rules": rules})
    assert files(shuffled(collection, rng), config) == files(collection, config)


@settings(deadline=None, max_examples=60)
@given(collections(), RULES)
def test_an_excluded_annotator_leaves_no_trace(collection, rules):
    config = CONFIG.model_copy(update={"rules": rules})
    gone = {person.id for person in collection.annotators if person.excluded}
    never = collect(
        collection.project,
        collection.items,
        [one for one in collection.votes if one.annotator not in gone],
        [person for person in collection.annotators if person.id not in gone],
        [one for one in collection.decisions if one.annotator not in gone],
    )
    assert files(collection, config) == files(never, config)


def test_dawid_skene_snapshots_do_not_depend_on_the_order_either():
    rng = random.Random(3)
    table = {
        f"i{n}": {who: rng.choice(["a", "b", "tie"]) for who in ("ann", "bob", "cat")} for n in range(12)
    }
    collection = pairs(table)
    config = CONFIG.model_copy(update={"rules": RowRules(consensus="dawid_skene", ties="soften")})
    first = files(collection, config)
    assert all(files(shuffled(collection, rng), config) == first for _ in range(4))


@settings(deadline=None, max_examples=60)
@given(collections(), RULES, st.floats(0.0, 1.0))
def test_a_group_is_never_on_both_sides_of_the_pipelines_split(collection, rules, eval_fraction):
    found = make_rows(collection, rules)
    for kind in ("preferences", "demonstrations"):
        sides: dict[str, set[str]] = {}
        for raw in getattr(found, kind):
            for row in to_rows(raw, kind):
                sides.setdefault(raw["group"], set()).add(split_of(row["prompt"], eval_fraction))
        assert all(len(side) == 1 for side in sides.values())


def test_groups_tell_prompts_apart():
    assert group_of(item("x", prompt="one")) == group_of(item("y", prompt="one"))
    assert group_of(item("x", prompt="one")) != group_of(item("x", prompt="two"))


def test_the_pipelines_reader_reads_a_snapshot(tmp_path):
    collection = pairs({"i1": {"ann": "b3", "bob": "b1"}, "i2": {"ann": "tie"}, "i3": {"ann": "a"}})
    write_snapshot(collection, CONFIG, tmp_path / "set")
    read = list(read_file(tmp_path / "set" / "preferences.jsonl"))
    rows = [row for raw in read for row in to_rows(raw.values, "preferences")]
    assert [
        (row["prompt"], row["chosen"], row["rejected"], row["margin"], row["probability"]) for row in rows
    ] == [
        ("question i1?", "i1 answer 1", "i1 answer 0", 2.0, 1.0),
        ("question i2?", "i2 answer 0", "i2 answer 1", 0.0, 0.5),
        ("question i3?", "i3 answer 0", "i3 answer 1", 2.0, 1.0),
    ]
    corrections = pairs({"i1": {"ann": Correction(text="rather so")}}, kind="correction")
    write_snapshot(corrections, CONFIG, tmp_path / "set")
    (raw,) = read_file(tmp_path / "set" / "demonstrations.jsonl")
    (row,) = to_rows(raw.values, "demonstrations")
    assert (row["prompt"], row["response"]) == ("question i1?", "rather so")
    assert not (tmp_path / "set" / "preferences.jsonl").exists()


def test_ratings_are_read_with_their_scores(tmp_path):
    items = [item(name, "rating", "a question") for name in ("x", "y")]
    table = {name: {"ann": Ratings(ratings={"tone": n, "truth": n})} for name, n in (("x", 2), ("y", 5))}
    write_snapshot(pairs(table, kind="rating", items=items), CONFIG, tmp_path / "set")
    (raw,) = read_file(tmp_path / "set" / "preferences.jsonl")
    (row,) = to_rows(raw.values, "preferences")
    assert (row["chosen"], row["chosen_score"], row["rejected_score"], row["margin"]) == (
        "y answer 0",
        5,
        2,
        3,
    )


def test_a_time_zone_changes_no_byte():
    items = [item("i1")]
    east = datetime(2026, 3, 1, 15, 30, tzinfo=timezone(timedelta(hours=3, minutes=30)))
    made = [
        files(collect(project(), items, [vote("i1", "ann", "a", at=at)], people("ann")))
        for at in (START, east)
    ]
    assert made[0] == made[1]
    assert east == START == datetime(2026, 3, 1, 12, tzinfo=UTC)


def test_the_content_hash_changes_with_a_vote_and_with_a_rule():
    table = {"i1": {"ann": "tie", "bob": "a"}}
    hashes = {
        make_snapshot(pairs(table), CONFIG).content_hash,
        make_snapshot(pairs({"i1": {"ann": "tie", "bob": "b"}}), CONFIG).content_hash,
        make_snapshot(
            pairs(table), CONFIG.model_copy(update={"rules": RowRules(ties="soften")})
        ).content_hash,
        make_snapshot(
            pairs(table), CONFIG.model_copy(update={"rules": RowRules(pseudonym_key="k")})
        ).content_hash,
    }
    assert len(hashes) == 4


def test_the_card_says_what_the_set_is(tmp_path):
    table = {f"i{n}": {"ann": "a", "bob": "ab"[n % 2]} for n in range(6)}
    table["gold"] = {"ann": "a"}
    items = [item(name, gold=Choice(choice="a", strength=1) if name == "gold" else None) for name in table]
    config = CONFIG.model_copy(
        update={"consent": "Signed | form 3", "rules": RowRules(pseudonym_key="secret")}
    )
    snapshot = write_snapshot(pairs(table, items=items), config, tmp_path / "set")
    text = (tmp_path / "set" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "CC-BY-4.0"
    assert {one["data_files"] for one in front["configs"]} == {"preferences.jsonl", "votes.jsonl"}
    for words in (
        snapshot.content_hash,
        "| votes | 13 |",
        "| gold item | 1 |",
        "Signed \\| form 3",
        "Krippendorff's alpha",
        "2026-03-01T12:00:00+00:00 to 2026-03-01T12:00:00+00:00",
    ):
        assert words in text
    everything = "".join(snapshot.files.values())
    assert "secret" not in everything
    assert "name of ann" not in everything
    assert '"ann"' not in everything


def test_a_snapshot_is_whole_or_not_there(tmp_path, monkeypatch):
    place = tmp_path / "set"
    write_snapshot(pairs({"i1": {"ann": "a"}}), CONFIG, place)
    before = {path.name: path.read_bytes() for path in place.iterdir()}

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("feedback.snapshot.write_whole", full)
    with pytest.raises(OSError, match="No space left"):
        write_snapshot(pairs({"i1": {"ann": "b"}}), CONFIG, place)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_changed_snapshot_is_noticed(tmp_path):
    place = tmp_path / "set"
    write_snapshot(pairs({"i1": {"ann": "a"}}), CONFIG, place)
    assert check_snapshot(place)["counts"]["votes"] == 1
    rows = (place / "preferences.jsonl").read_text()
    (place / "preferences.jsonl").write_text(rows.replace("answer 0", "answer 9"))
    with pytest.raises(ValueError, match=r"preferences\.jsonl: was changed"):
        check_snapshot(place)
    (place / "preferences.jsonl").unlink()
    with pytest.raises(ValueError, match="not a whole snapshot"):
        check_snapshot(place)


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds no manifest\.json"):
        write_snapshot(pairs({"i1": {"ann": "a"}}), CONFIG, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_nothing_to_say_is_an_error():
    with pytest.raises(ValueError, match="no vote counts"):
        make_snapshot(pairs({"i1": {"ann": "a"}}, excluded=["ann"]), CONFIG)


def test_the_command_makes_checks_and_refuses(tmp_path, root):
    records = tmp_path / "records.jsonl"
    records.write_text(write_collection(pairs({"i1": {"ann": "a", "bob": "tie"}})))

    def command(*arguments):
        words = [sys.executable, "-m", "feedback.snapshot", *map(str, arguments)]
        return subprocess.run(words, cwd=root, capture_output=True, text=True)

    made = command(records, tmp_path / "set", "--license", "CC0-1.0", "--ties", "soften")
    assert made.returncode == 0, made.stderr
    assert check_snapshot(tmp_path / "set")["rules"]["ties"] == "soften"
    assert "whole, content" in command("--check", tmp_path / "set").stdout
    wrong = command(records, tmp_path / "other", "--license", "CC0-1.0", "--ties", "break")
    assert wrong.returncode == 2
    assert "ties: 'break': Input should be 'keep', 'drop' or 'soften'" in wrong.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_dvc_output_is_the_same_whatever_the_order_of_the_records(tmp_path, root):
    """`dvc repro` runs the stage for a records file in another order, and finds the output it had."""
    lines = write_collection(
        pairs({f"i{n}": {"ann": "a", "bob": "ab"[n % 2]} for n in range(9)})
    ).splitlines()
    bin_directory = Path(sys.executable).parent
    command = f"{sys.executable} -m feedback.snapshot records.jsonl set --license CC0-1.0"
    stage = {"cmd": command, "deps": ["records.jsonl"], "outs": ["set"]}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"feedback": stage}}))

    def dvc(*arguments):
        env = os.environ | {"PYTHONPATH": str(root), "DVC_NO_ANALYTICS": "1"}
        subprocess.run([bin_directory / "dvc", *arguments], cwd=tmp_path, env=env, check=True)

    def repro(records):
        (tmp_path / "records.jsonl").write_text("".join(f"{line}\n" for line in records))
        dvc("repro", "-q")
        lock = yaml.safe_load((tmp_path / "dvc.lock").read_text())["stages"]["feedback"]
        return lock["deps"][0]["md5"], lock["outs"][0]["md5"]

    dvc("init", "--no-scm", "-q")
    first, second = repro(lines), repro(lines[::-1])
    assert first[0] != second[0]
    assert first[1] == second[1]
