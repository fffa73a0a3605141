"""A remote that lacks files or holds damaged ones: each is named, nothing is lost, the cache mends it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_core.config import load_params
from tasks import remote, worktrees
from tasks.remote import Remote, RemoteError, md5_of
from tasks.worktrees import DataError, RunPlace

FILES = {"tokenizer": "few words", "weights": "many numbers"}
WHO = ("-c", "user.name=a", "-c", "user.email=a@example.org")


def command(where, *words, ok=True):
    done = subprocess.run(words, cwd=where, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def dvc(where, *words, ok=True):
    return command(where, sys.executable, "-m", "dvc", *words, ok=ok)


@pytest.fixture
def home(tmp_path, root, monkeypatch):
    """A checkout with a directory under DVC, pushed to a remote directory with the shipped settings."""
    for variable in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(variable, "/dev/null")
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    made = tmp_path / "home"
    (made / "mine").mkdir(parents=True)
    for name, text in FILES.items():
        (made / "mine" / name).write_text(text)
    command(made, "git", "init", "-q", "-b", "main")
    dvc(made, "init", "-q")
    (made / ".dvc" / "config").write_text((root / ".dvc" / "config").read_text())
    (made / "dvc.yaml").write_text("stages: {}\n")
    (made / "params.yaml").write_text((root / "params.yaml").read_text())
    dvc(made, "remote", "modify", "-q", "local", "url", str(tmp_path / "store"))
    dvc(made, "add", "-q", "mine")
    with (made / ".gitignore").open("a") as file:
        file.write(".rlhf/\n")
    command(made, "git", "add", "-A")
    command(made, "git", *WHO, "commit", "-q", "-m", "data")
    dvc(made, "push", "-q")
    return made


def stored(home, name):
    """Path of an object on the remote, and on it alone."""
    md5 = md5_of(home / "mine" / name)
    return home.parent / "store" / "files" / "md5" / md5[:2] / md5[2:]


def spoil(path):
    path.unlink()
    path.write_text("rubbish")


def clone_of(home):
    target = home.parent / "clone"
    command(home, "git", "clone", "-q", str(home), str(target))
    return target


def contents(cache):
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def test_a_whole_remote_has_no_fault(home):
    assert Remote(home).faults(content=True) == []
    assert Remote(home).outputs().keys() == {"mine"}


@pytest.mark.parametrize("harm", [Path.unlink, spoil])
def test_a_bad_file_is_named_and_mended_from_the_cache(home, harm, capsys):
    harm(stored(home, "weights"))
    (fault,) = Remote(home).faults(content=True)
    assert (fault.path, fault.md5) == ("mine/weights", md5_of(home / "mine" / "weights"))
    assert fault.what.startswith("missing" if harm is Path.unlink else "damaged")
    if harm is Path.unlink:
        dvc(home, "push", "-q")  # DVC alone leaves it as it is
        assert len(Remote(home).faults(content=True)) == 1
    assert remote.mend(home, print) == 0
    assert "1 of 1 files mended" in capsys.readouterr().out
    assert stored(home, "weights").read_text() == FILES["weights"]
    clone = clone_of(home)
    dvc(clone, "pull", "-q")
    assert (clone / "mine" / "weights").read_text() == FILES["weights"]


def test_the_list_of_a_directory_that_is_damaged(home):
    (listing,) = (home.parent / "store").rglob("*.dir")
    spoil(listing)
    (fault,) = Remote(home).faults(content=True)
    assert (fault.path, fault.what[:7]) == ("mine", "damaged")
    assert Remote(home).mend([fault]) == []
    assert Remote(home).faults(content=True) == []


def test_what_the_cache_has_not_whole_either_is_not_sent(home):
    weights = stored(home, "weights")
    weights.unlink()
    md5 = md5_of(home / "mine" / "weights")
    cached = home / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]
    cached.unlink()
    cached.write_text("rubbish too")
    assert remote.mend(home, lambda _: None) == 1
    assert not weights.exists()


@pytest.mark.parametrize("harm", [Path.unlink, spoil])
def test_a_pull_from_a_bad_remote_names_the_file_and_leaves_checkout_and_cache_whole(home, harm):
    clone = clone_of(home)
    harm(stored(home, "weights"))
    place = RunPlace("r1", clone, clone)
    with pytest.raises(DataError, match=r"mine/weights \(md5 [0-9a-f]{32}\) is (missing|damaged)"):
        worktrees.bring_data(place, load_params(clone / "params.yaml"))
    assert not (clone / "mine").exists()
    objects = contents(clone / ".dvc" / "cache" / "files" / "md5")
    whole = contents(home / ".dvc" / "cache" / "files" / "md5")
    assert objects.items() <= whole.items()
    assert FILES["weights"].encode() not in objects.values()
    assert command(clone, "git", "status", "--porcelain") == ""

    assert remote.mend(home, lambda _: None) == 0
    worktrees.bring_data(place, load_params(clone / "params.yaml"))
    assert (clone / "mine" / "weights").read_text() == FILES["weights"]


@pytest.mark.parametrize("harm", [Path.unlink, spoil])
def test_an_older_version_in_the_checkout_survives_a_failed_pull(home, harm):
    clone = clone_of(home)
    dvc(clone, "pull", "-q")
    (home / "mine" / "weights").unlink()
    (home / "mine" / "weights").write_text("newer numbers")
    dvc(home, "add", "-q", "mine")
    command(home, "git", *WHO, "commit", "-q", "-a", "-m", "newer")
    dvc(home, "push", "-q")
    command(clone, "git", "pull", "-q")
    harm(stored(home, "weights"))
    dvc(clone, "pull", ok=False)
    found = (
        {path.name: path.read_text() for path in (clone / "mine").glob("*")}
        if (clone / "mine").exists()
        else {}
    )
    assert "rubbish" not in found.values()
    whole = {path.read_text() for path in (clone / ".dvc" / "cache").rglob("*") if path.is_file()}
    assert FILES["weights"] in whole  # the older version is in the cache in any case
    assert found.items() <= (FILES | {"weights": FILES["weights"]}).items()


def test_a_run_sends_again_what_has_gone_missing(home):
    with worktrees.run_place(home, "r1", "") as place:
        worktrees.bring_data(place, load_params(home / "params.yaml"))
    stored(home, "weights").unlink()
    assert worktrees.push(place)
    assert stored(home, "weights").read_text() == FILES["weights"]


def test_a_push_that_stays_partial_says_which_file(home):
    with worktrees.run_place(home, "r1", "") as place:
        worktrees.bring_data(place, load_params(home / "params.yaml"))
    stored(home, "weights").unlink()
    md5 = md5_of(home / "mine" / "weights")
    (home / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]).unlink()
    with pytest.raises(DataError, match="mine/weights"):
        worktrees.push(place)


def test_no_remote_at_all(home):
    dvc(home, "remote", "remove", "-q", "local")
    with pytest.raises(RemoteError, match="no DVC remote"):
        Remote(home)


def test_the_commands_end_with_a_status(home):
    assert "all files are read" in command(home, "rlhf", "remote", "check", "--content")
    stored(home, "tokenizer").unlink()
    said = command(home, "rlhf", "remote", "check", ok=False)
    assert "mine/tokenizer" in said
    assert "1 faults" in said
