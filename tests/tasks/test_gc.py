"""What `rlhf gc` frees is needed by nobody; a run beside it loses nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import yaml

from rlhf_core.errors import InputError, RLHFError
from rlhf_core.layout import Layout
from rlhf_core.mlflow_writer import open_client
from tasks import cache, gc, needs, worktrees
from tasks.gc import Options, collect, examine
from tasks.network import free_port

WHO = ("-c", "user.name=a", "-c", "user.email=a@example.org")


def command(where, *words):
    done = subprocess.run(words, cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def make_home(root):
    root.mkdir()
    command(root, "git", "init", "-q", "-b", "main")
    command(root, sys.executable, "-m", "dvc", "init", "-q")
    (root / ".gitignore").write_text(".rlhf/\nmlflow.db*\nmodels/\n")
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / "params.yaml").write_text("seed: 0\n")
    return root


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A repository under git and DVC with one commit, in which no run has been and no server is named."""
    for variable in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(variable, "/dev/null")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(cache, "LOCK_SECONDS", 20.0)
    root = make_home(tmp_path / "home")
    commit(root)
    return root


def commit(home, message="a commit"):
    command(home, "git", "add", "-A")
    command(home, "git", *WHO, "commit", "-q", "--allow-empty", "-m", message)


def put_file(home, text):
    """An object of the cache, as DVC lays it down."""
    data = text.encode()
    md5 = hashlib.md5(data).hexdigest()
    path = home / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return md5


def put_dir(home, **files):
    entries = [{"md5": put_file(home, text), "relpath": name} for name, text in files.items()]
    listing = json.dumps(entries)
    md5 = put_file(home, listing)
    path = home / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]
    path.rename(f"{path}.dir")
    return f"{md5}.dir"


def write_lock(root, **outputs):
    outs = [{"path": f"models/{name}", "hash": "md5", "md5": md5} for name, md5 in outputs.items()]
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {"s": {"outs": outs}}}))


def on_branch(home, branch, **outputs):
    """A branch whose last commit names the outputs; the checkout goes back to main."""
    command(home, "git", "checkout", "-q", "-b", branch)
    write_lock(home, **outputs)
    commit(home)
    command(home, "git", "checkout", "-q", "main")


def objects(home):
    return set(cache.of_checkout(home).objects())


def members(home, md5):
    return {md5, *cache.of_checkout(home).members(md5).values()}


def register(home, **tags):
    client = open_client(home)
    client.create_registered_model("rlhf-policy")
    client.create_model_version(
        "rlhf-policy", "file:///nowhere", tags={k.replace("_", "."): v for k, v in tags.items()}
    )


def test_what_refs_trees_and_versions_name_stays_and_the_rest_goes(home):
    old = put_dir(home, weights="old", tokenizer="shared")
    by_run = put_dir(home, weights="of a run", tokenizer="shared")
    tagged = put_dir(home, weights="tagged")
    stashed = put_dir(home, weights="stashed")
    uncommitted = put_dir(home, weights="uncommitted")
    registered = put_dir(home, weights="registered")
    lone = put_file(home, "a registered file")
    unknown = put_file(home, "nobody knows")
    on_branch(home, "runs/r1", policy=by_run)
    on_branch(home, "going", policy=tagged)
    command(home, "git", "tag", "v1", "going")
    command(home, "git", "branch", "-q", "-D", "going")
    write_lock(home, policy=stashed)
    command(home, "git", "add", "-A")
    command(home, "git", *WHO, "stash", "-q")
    write_lock(home, policy=uncommitted)
    register(home, dvc_models_policy=registered, dvc_data_quarantine_jsonl=lone, dvc_lock_md5="0" * 32)
    being_written = home / ".dvc" / "cache" / "files" / "md5" / "ab" / "cd.tmp"
    being_written.parent.mkdir(exist_ok=True)
    being_written.write_text("in transit")
    kept = set().union(*(members(home, md5) for md5 in (by_run, tagged, stashed, uncommitted, registered)))
    kept |= {lone}
    gone = {old, hashlib.md5(b"old").hexdigest(), unknown}
    assert objects(home) == kept | gone

    found = examine(home, Options())
    assert found.garbage == gone
    assert found.freed == sum(found.sizes[md5] for md5 in gone)
    assert objects(home) == kept | gone
    assert collect(home, Options(), found) == found.freed
    assert objects(home) == kept
    assert being_written.exists()
    assert examine(home, Options()).garbage == set()


def test_all_commits_keeps_what_an_earlier_commit_names(home):
    first, second = put_dir(home, weights="1"), put_dir(home, weights="2")
    for md5 in (first, second):
        write_lock(home, policy=md5)
        commit(home)
    assert first in examine(home, Options()).garbage
    assert examine(home, Options(all_commits=True)).garbage == set()


def test_without_yes_nothing_goes(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    monkeypatch.setenv("COLUMNS", "150")
    write_lock(home, policy=put_dir(home, weights="w" * 2**21))
    orphan = put_dir(home, weights="x" * 2**20)
    before = objects(home)
    monkeypatch.setattr("sys.argv", ["rlhf gc"])
    gc.main()
    said = capsys.readouterr().out
    assert f"working tree {home}" in said
    assert "2.0" in said
    assert "cache: a directory of weights" in said
    assert "nothing was removed; `rlhf gc --yes` frees 1.0 MiB" in said
    assert objects(home) == before
    monkeypatch.setattr("sys.argv", ["rlhf gc", "--yes"])
    gc.main()
    assert "freed 1.0 MiB" in capsys.readouterr().out
    assert before - objects(home) == {orphan, hashlib.md5(b"x" * 2**20).hexdigest()}


def test_a_registry_that_does_not_answer_stops_it(home, monkeypatch, capsys):
    put_dir(home, weights="w")
    before = objects(home)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port(5900)}")
    monkeypatch.chdir(home)
    monkeypatch.setattr("sys.argv", ["rlhf gc", "--yes"])
    with pytest.raises(SystemExit):
        gc.main()
    assert "does not answer" in capsys.readouterr().err
    assert objects(home) == before


def test_a_registry_that_is_damaged_stops_it(home):
    (home / "mlflow.db").write_text("no database at all, but some text that is long enough" * 20)
    with pytest.raises(RLHFError, match="registry cannot be asked"):
        examine(home, Options())


def test_a_lock_file_that_cannot_be_read_is_named(home):
    command(home, "git", "checkout", "-q", "-b", "bad")
    (home / "dvc.lock").write_text("stages: [: ")
    commit(home)
    command(home, "git", "checkout", "-q", "main")
    with pytest.raises(InputError, match=r"dvc\.lock: not a file of DVC"):
        examine(home, Options())


def test_files_that_may_be_of_a_directory_that_is_not_here_stay(home):
    absent = put_dir(home, weights="half pulled")
    cache.of_checkout(home).path(absent).unlink()
    on_branch(home, "colleague", policy=absent)
    orphan = put_dir(home, weights="orphan")
    found = examine(home, Options())
    assert found.lacking == ["models/policy of branch colleague"]
    assert found.garbage == members(home, orphan)


def test_a_live_run_keeps_all_that_its_worktree_names(home):
    names = {name: put_dir(home, weights=name) for name in ("base", "sft")}
    with worktrees.run_place(home, "r1", "") as place:
        write_lock(place.root, **names)
        (place.root / ".rlhf" / "runs" / "ppo" / "checkpoints").mkdir(parents=True)
        for options in (Options(), Options(stopped=True)):
            found = examine(home, options)
            assert found.garbage == set()
            assert [one.kept_for for one in found.leftovers] == ["it is running"]
            collect(home, options, found)
        assert (place.root / ".rlhf" / "runs" / "ppo" / "checkpoints").is_dir()
    assert objects(home) >= set(names.values())
    (left,) = examine(home, Options()).leftovers
    assert left.kept_for == "its process is still there"  # it may still send data to the remote
    worktrees.note(place, process=2**22 + 1)  # more than Linux gives out
    collect(home, Options(), examine(home, Options()))
    assert not place.root.exists()
    assert objects(home) >= set(names.values())  # of the branch


def test_a_run_that_was_broken_off_can_go_on_unless_asked(home):
    committed, lost = put_dir(home, weights="committed"), put_dir(home, weights="not committed")
    place = broken_off(home, "r1", policy=committed)
    write_lock(place.root, policy=lost)  # a process that is killed commits nothing
    worktrees.note(place, process=2**22 + 1)
    checkpoints = Layout(home).run_dir("sft") / "checkpoints" / "step-1"
    checkpoints.mkdir(parents=True)
    (checkpoints / "tensors").write_text("10 letters")
    found = examine(home, Options())
    assert found.garbage == set()
    assert all("can go on" in one.kept_for for one in found.leftovers)
    assert len(found.leftovers) == 2
    assert collect(home, Options(), found) == 0
    found = examine(home, Options(stopped=True))
    assert found.garbage == members(home, lost)
    assert collect(home, Options(stopped=True), found) == found.freed > 10
    assert not place.root.exists()
    assert not checkpoints.exists()
    assert objects(home) == members(home, committed)


def broken_off(home, run_id, **outputs):
    with contextlib.suppress(RuntimeError), worktrees.run_place(home, run_id, "") as place:
        write_lock(place.root, **outputs)
        raise RuntimeError("no")
    return place


def test_what_a_run_takes_from_the_run_cache_meanwhile_stays(home):
    """The race that matters: listed as unneeded, then taken over by a run under DVC's lock."""
    taken, orphan = put_dir(home, weights="taken"), put_dir(home, weights="orphan")
    with worktrees.run_place(home, "r1", "") as place:
        listed = examine(home, Options())
        assert listed.garbage == members(home, taken) | members(home, orphan)
        with cache.locked([place.root]):  # as DVC while it restores
            collecting = threading.Thread(target=collect, args=(home, Options(), listed))
            collecting.start()
            time.sleep(0.5)
            assert objects(home) >= listed.garbage
            write_lock(place.root, policy=taken)
        collecting.join(60)
    assert objects(home) == members(home, taken)


def test_a_run_that_begins_meanwhile_waits(home):
    begun = threading.Event()

    def begin():
        with worktrees.run_place(home, "r1", ""):
            begun.set()

    with worktrees.no_run_begins(home):
        run = threading.Thread(target=begin)
        run.start()
        assert not begun.wait(0.5)
    assert begun.wait(60)
    run.join()


def test_dvc_at_work_for_long_is_said(home, monkeypatch):
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.0)
    with cache.locked([home]), pytest.raises(RLHFError, match="DVC is at work there"), cache.locked([home]):
        pass


def test_a_cache_that_others_may_use(home, tmp_path):
    other = make_home(tmp_path / "other")
    commit(other)
    command(other, sys.executable, "-m", "dvc", "cache", "dir", "--local", str(home / ".dvc" / "cache"))
    mine, theirs = put_dir(home, weights="mine"), put_dir(home, weights="theirs")
    write_lock(home, policy=mine)
    write_lock(other, policy=theirs)
    with pytest.raises(InputError, match="lies outside"):
        examine(other, Options())
    assert examine(other, Options(others=[home])).garbage == set()
    assert examine(other, Options(alone=True)).garbage == members(home, mine)
    assert examine(home, Options(others=[other])).garbage == set()


def test_the_state_of_a_killed_temporary_server_goes(home):
    for number in (os.getpid(), 2**22 + 1):
        (home / ".rlhf" / f"prefect-{number}").mkdir(parents=True)
    collect(home, Options(), examine(home, Options()))
    assert [path.name for path in (home / ".rlhf").glob("prefect-*")] == [f"prefect-{os.getpid()}"]


def test_needs_that_are_the_same_are_one_line():
    a, b = {"models/policy": "1"}, {"models/policy": "2"}
    merged = needs.merged([needs.Need(str(n), a) for n in range(5)] + [needs.Need("other", b)])
    assert [need.who for need in merged] == ["0, 1, 2 and 2 more", "other"]


def test_dvc_works_on_with_what_is_left(home):
    stage = {"cmd": "cp source out", "deps": ["source"], "outs": ["out"]}
    (home / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"s": stage}}))
    for text in ("first\n", "second\n"):
        (home / "source").write_text(text)
        command(home, sys.executable, "-m", "dvc", "repro")
        commit(home)
    found = examine(home, Options())
    assert gc.what_goes(found, cache.of_checkout(home)) == [("out", 1, len("first\n"))]
    collect(home, Options(), found)
    (home / "out").unlink()
    command(home, sys.executable, "-m", "dvc", "checkout", "-q")
    assert (home / "out").read_text() == "second\n"
    command(home, "git", "checkout", "-q", "HEAD~1")
    assert "Running stage" in command(
        home, sys.executable, "-m", "dvc", "repro"
    )  # the run cache has no output
    assert (home / "out").read_text() == "first\n"
