"""What is said of runs: from their branches and notes, without a server or a model."""

from __future__ import annotations

import io
import json
import subprocess

import pytest
import yaml
from rich.console import Console

from rlhf_core.errors import InputError
from tasks import runs, worktrees


def git(where, *words):
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", *who, *words], cwd=where, capture_output=True, text=True, check=True)


def finish_run(home, run_id, kl_coef, policy):
    """A run as `run_place` leaves it."""
    with worktrees.run_place(home, run_id, "") as place:
        (place.root / "params.yaml").write_text(yaml.safe_dump({"ppo": {"kl_coef": kl_coef, "gamma": 1.0}}))
        outs = {"sft": {"path": "models/sft", "md5": "aa.dir", "size": 2 * 2**20}}
        outs["ppo"] = {"path": "models/policy", "md5": policy, "size": 3 * 2**20}
        lock = {"schema": "2.0", "stages": {name: {"cmd": name, "outs": [out]} for name, out in outs.items()}}
        (place.root / "dvc.lock").write_text(yaml.safe_dump(lock))
        reports = place.root / "reports" / "evaluate"
        reports.mkdir(parents=True)
        (reports / "metrics.json").write_text(json.dumps({"eval/kl": 10 * kl_coef, "eval/same": 1}))
    worktrees.remove(place)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("home")
    git(root, "init", "-q", "-b", "main")
    (root / ".dvc").mkdir()
    (root / ".dvc" / "config").write_text("")
    (root / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
    (root / ".gitignore").write_text(".rlhf/\n")
    (root / "params.yaml").write_text(yaml.safe_dump({"ppo": {"kl_coef": 0.05, "gamma": 1.0}}))
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "start")
    finish_run(root, "20260101-000000-aaaaaaaa", 0.1, "b1.dir")
    finish_run(root, "20260102-000000-abbbbbbb", 0.3, "b2.dir")
    return root


def text_of(*shown):
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(*shown)
    return console.export_text()


def test_a_list_shows_state_what_differs_and_size_newest_first(home):
    found = runs.all_runs(home)
    assert [run.run_id[:8] for run in found] == ["20260102", "20260101"]
    text = text_of(runs.list_table(found, {"ppo.kl_coef": 0.05, "ppo.gamma": 1.0}))
    newest, oldest = (line for line in text.splitlines() if "2026" in line)
    assert newest.split() == [
        "20260102-000000-abbbbbbb",
        "finished",
        "ppo.kl_coef=0.3",
        "-",
        "3",
        "-",
        "-",
        "5",
    ]
    assert "ppo.kl_coef=0.1" in oldest
    assert "gamma" not in text


def test_two_runs_are_compared_by_what_differs(home):
    a, b = runs.find(home, "aaaa"), runs.find(home, "runs/20260102")
    text = text_of(*runs.compare_tables(a, b))
    assert "ppo.kl_coef" in text
    assert "eval/kl" in text
    assert "models/policy" in text
    assert "b1.dir" in text
    for equal in ("gamma", "models/sft", "eval/same"):
        assert equal not in text


@pytest.mark.parametrize("text", ["a", "nothing", ""])
def test_a_name_that_fits_none_or_several_runs_is_refused(home, text):
    with pytest.raises(InputError, match=r"must name one run; there are: "):
        runs.find(home, text)


def test_a_run_that_says_it_is_running_while_nothing_runs_has_crashed(home):
    with worktrees.run_place(home, "20260103-000000-cccccccc", "") as place:
        assert runs.find(home, "cccc").state == "running"
    worktrees.note(place, state="running")
    assert runs.find(home, "cccc").state == "crashed"
    assert runs.find(home, "cccc").metrics == {}
    worktrees.remove(place)
    git(home, "branch", "-D", place.branch)


def test_a_run_without_outputs_cannot_be_repeated(home):
    with worktrees.run_place(home, "20260104-000000-dddddddd", "") as place:
        pass
    with pytest.raises(InputError, match="no outputs to compare with"):
        runs.reproduce(runs.find(home, "dddd"), print)
    worktrees.remove(place)
    git(home, "branch", "-D", place.branch)
