"""The place of a run: what it starts from, what is kept, and how it is taken up again."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rlhf_core.config import load_params
from rlhf_core.errors import InputError
from rlhf_core.layout import Layout
from tasks import worktrees
from tasks.workspace import BusyError


def command(where, *words):
    done = subprocess.run(words, cwd=where, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A repository with two commits, under git and DVC, in which nobody has said who they are."""
    for variable in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(variable, "/dev/null")
    root = tmp_path / "home"
    root.mkdir()
    command(root, "git", "init", "-q", "-b", "main")
    command(root, sys.executable, "-m", "dvc", "init", "-q")
    command(root, sys.executable, "-m", "dvc", "remote", "add", "-q", "-d", "near", "../remote")
    (root / ".gitignore").write_text(".rlhf/\n")
    for text in ("first", "second"):
        (root / "params.yaml").write_text(text)
        command(root, "git", "add", "-A")
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        command(root, "git", *who, "commit", "-q", "-m", text)
    return root


def test_a_run_starts_from_the_last_commit_with_the_parameters_as_they_lie(home):
    (home / "params.yaml").write_text("not committed")
    (home / "other").write_text("not committed either")
    with worktrees.run_place(home, "r1", "") as place:
        assert (place.root / "params.yaml").read_text() == "not committed"
        assert not (place.root / "other").exists()
        assert Layout(place.root).home == home
        (place.root / "dvc.lock").write_text("lock")
    assert command(home, "git", "show", "runs/r1:dvc.lock") == "lock"
    assert command(home, "git", "show", "runs/r1:params.yaml") == "not committed"
    assert command(home, "git", "log", "-1", "--format=%an", "runs/r1") == "rlhf pipeline"
    assert (home / "params.yaml").read_text() == "not committed"
    worktrees.remove(place)
    assert not place.root.exists()
    assert worktrees.read_note(home, "r1")["state"] == "finished"


def test_a_run_that_has_recorded_all_it_made_ends_on_that_commit(home):
    """Else what was registered in between would name a commit that is not the end of the branch."""
    with worktrees.run_place(home, "r1", "") as place:
        (place.root / "dvc.lock").write_text("lock")
        worktrees.record(place, "Run r1")
        reached = command(place.root, "git", "rev-parse", "HEAD")
    assert command(home, "git", "rev-parse", "runs/r1") == reached
    assert command(home, "git", "show", f"{reached}:dvc.lock") == "lock"
    with worktrees.run_place(home, "r2", "") as place:
        worktrees.record(place, "Run r2")
        (place.root / "dvc.lock").write_text("more")
    assert command(home, "git", "show", "runs/r2:dvc.lock") == "more"


def test_a_named_revision_is_taken_whole(home):
    (home / "params.yaml").write_text("not committed")
    with worktrees.run_place(home, "r1", "HEAD~1") as place:
        assert (place.root / "params.yaml").read_text() == "first"
    with (
        pytest.raises(InputError, match="'nowhere': git knows no such branch"),
        worktrees.run_place(home, "r2", "nowhere"),
    ):
        pass


def test_a_broken_off_run_is_recorded_and_taken_up_with_all_that_lay_there(home):
    def work():
        with worktrees.run_place(home, "r1", "") as place:
            (place.root / "dvc.lock").write_text("half")
            (place.root / ".rlhf" / "checkpoint").write_text("of step 3")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert worktrees.read_note(home, "r1")["state"] == "stopped"
    assert command(home, "git", "show", "runs/r1:dvc.lock") == "half"
    (home / "params.yaml").write_text("changed since")
    with worktrees.run_place(home, "r1", "") as place:
        assert (place.root / ".rlhf" / "checkpoint").read_text() == "of step 3"
        assert (place.root / "params.yaml").read_text() == "second"
    with pytest.raises(OSError, match="full"), worktrees.run_place(home, "r2", ""):
        raise OSError("full")
    assert worktrees.read_note(home, "r2") | {"state": "failed", "reason": "full"} == worktrees.read_note(
        home, "r2"
    )


def test_a_run_that_goes_on_is_not_started_twice(home):
    with worktrees.run_place(home, "r1", ""):
        with pytest.raises(BusyError, match="another run works here"), worktrees.run_place(home, "r1", ""):
            pass
        with worktrees.run_place(home, "r2", "") as beside:
            assert beside.root.is_dir()


def test_a_place_that_somebody_removed_comes_back_from_its_branch(home):
    with worktrees.run_place(home, "r1", "") as place:
        (place.root / "dvc.lock").write_text("lock")
    subprocess.run(["rm", "-rf", place.root], check=True)
    with worktrees.run_place(home, "r1", "") as place:
        assert (place.root / "dvc.lock").read_text() == "lock"


def test_cache_and_remotes_are_those_of_the_checkout(home):
    (home / ".dvc" / "config.local").write_text("['remote \"near\"']\n    jobs = 3\n")
    with worktrees.run_place(home, "r1", "") as place:
        assert worktrees.dvc(place.root, "cache", "dir") == str(home / ".dvc" / "cache")
        listed = worktrees.dvc(place.root, "config", "--list", "--local")
        assert f"remote.near.url={home.parent / 'remote'}" in listed
        assert "remote.near.jobs=3" in listed
        (place.root / "big").write_text("data")
        worktrees.dvc(place.root, "add", "-q", "big")
        assert worktrees.push(place)
    assert list((home.parent / "remote").rglob("*")) != []
    assert worktrees.git(place.root, "status", "--porcelain", ".dvc") == ""


def test_a_remote_that_does_not_answer_is_an_error_with_its_words(home):
    with worktrees.run_place(home, "r1", "") as place:
        (place.root / "big").write_text("data")
        worktrees.dvc(place.root, "add", "-q", "big")
        (home.parent / "remote").write_text("a file in the way")
        with pytest.raises(worktrees.DataError, match=r"dvc push .*: "):
            worktrees.push(place)


def test_the_same_flow_run_finds_its_place_again(home):
    first = worktrees.run_id_of(home, "0a1b2c3d-0000")
    assert first.endswith("-0a1b2c3d")
    with worktrees.run_place(home, first, ""):
        pass
    assert worktrees.run_id_of(home, "0a1b2c3d-0000") == first
    assert worktrees.run_id_of(home, "ffffffff-0000") != first


def test_data_that_the_run_could_not_see_is_named(home, root):
    (home / "mine.jsonl").write_text("{}")
    params = load_params(root / "params.yaml")
    params = params.model_copy(update={"data": params.data.model_copy(update={"prompts": ("mine.jsonl",)})})
    wanted = pytest.raises(InputError, match=r"data.prompts: mine.jsonl is in .*`dvc add mine.jsonl`")
    with worktrees.run_place(home, "r1", "") as place, wanted:
        worktrees.bring_data(place, params)
    command(home, sys.executable, "-m", "dvc", "add", "-q", "mine.jsonl")
    command(home, "git", "add", "-A")
    command(home, "git", *worktrees.NOBODY, "commit", "-q", "-m", "data")
    with worktrees.run_place(home, "r2", "") as place:
        worktrees.bring_data(place, params)
        assert (place.root / "mine.jsonl").read_text() == "{}"


def test_without_a_remote_nothing_is_sent(home):
    command(home, sys.executable, "-m", "dvc", "remote", "remove", "near")
    command(home, "git", *worktrees.NOBODY, "commit", "-q", "-a", "-m", "no remote")
    with worktrees.run_place(home, "r1", "") as place:
        assert not worktrees.push(place)
