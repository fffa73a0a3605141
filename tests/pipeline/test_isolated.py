"""Runs in worktrees of their own: two at once, and one that takes over what another has computed."""

from __future__ import annotations

import json

import pytest
import yaml

from .checkouts import commit, run, start, wait_for


@pytest.fixture(scope="module")
def home(finished, tmp_path_factory):
    """A clone of the finished run without models, on the same DVC cache."""
    checkout, _ = finished
    commit(checkout, "keep the run")
    target = tmp_path_factory.mktemp("home") / "rlhf"
    run(["git", "clone", "-q", str(checkout), str(target)], checkout)
    done = run(["dvc", "cache", "dir", "--local", str(checkout / ".dvc" / "cache")], target)
    assert done.returncode == 0, done.stderr
    return target


def branches(home):
    found = run(["git", "branch", "--list", "runs/*", "--format", "%(refname:short)"], home)
    return found.stdout.split()


def committed(home, branch, name):
    done = run(["git", "show", f"{branch}:{name}"], home)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def outputs(home, branch):
    stages = committed(home, branch, "dvc.lock")["stages"].values()
    return {out["path"]: out["md5"] for stage in stages for out in stage.get("outs", [])}


def was_computed(home, branch, stage):
    kept = home / ".rlhf" / "kept" / branch.removeprefix("runs/")
    return f"Running stage '{stage}'" in (kept / ".rlhf" / "runs" / stage / "output.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_runs_at_once_have_a_place_each_and_a_third_takes_over(home, tmp_path):
    prices = {0.07: None, 0.3: None}
    for price in prices:
        command = ["rlhf", "run", "--isolated", "-S", f"ppo.kl_coef={price}"]
        prices[price] = start(command, home, tmp_path / f"{price}.log")
    worktrees = home / ".rlhf" / "worktrees"
    wait_for(lambda: len(list(worktrees.glob("*/.rlhf/runs/ppo/progress.json"))) == 2, 240)  # both at once
    for price, process in prices.items():
        assert process.wait(300) == 0, (tmp_path / f"{price}.log").read_text()[-3000:]

    assert len(branches(home)) == 2
    by_price = {committed(home, b, "params.yaml")["ppo"]["kl_coef"]: b for b in branches(home)}
    assert set(by_price) == set(prices)
    first, second = (outputs(home, by_price[price]) for price in prices)
    assert first["models/sft"] == second["models/sft"]
    assert first["models/policy"] != second["models/policy"]
    for branch in branches(home):
        assert not was_computed(home, branch, "sft")
        assert was_computed(home, branch, "ppo")
        assert "eval/kl" in committed(home, branch, "reports/evaluate/metrics.json")
    assert run(["git", "status", "--porcelain"], home).stdout == ""
    assert not (home / "models").exists()
    assert list(worktrees.iterdir()) == []
    assert len(run(["git", "worktree", "list"], home).stdout.splitlines()) == 1

    dvc_compares_the_branches(home, by_price, tmp_path)

    third = run(["rlhf", "run", "--isolated", "-S", "ppo.kl_coef=0.07"], home)
    assert third.returncode == 0, third.stderr[-3000:]
    (new,) = set(branches(home)) - set(by_price.values())
    assert not was_computed(home, new, "ppo")
    assert outputs(home, new) == first

    again = run(["rlhf", "runs", "reproduce", new], home, timeout=600)
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    assert f"{len(first)} of {len(first)} outputs are identical" in again.stdout
    listed = run(["rlhf", "runs"], home, COLUMNS="160").stdout
    assert listed.count("finished") == 4

    # Everything that the branch names is on the remote: a clone elsewhere gets the policy from there.
    clone = tmp_path / "clone"
    run(["git", "clone", "-q", "-b", new, str(home), str(clone)], home)
    run(["dvc", "remote", "modify", "--local", "local", "url", str(home / ".rlhf" / "remote")], clone)
    pulled = run(["dvc", "pull"], clone)
    assert pulled.returncode == 0, pulled.stderr
    assert (clone / "models" / "policy" / "model.safetensors").is_file()
    assert "up to date" in run(["dvc", "repro"], clone).stdout


def dvc_compares_the_branches(home, by_price, tmp_path):
    """DVC's own commands see runs as what they are: commits."""
    pair = [by_price[0.07], by_price[0.3]]
    shown = run(["dvc", "metrics", "diff", *pair, "--json"], home)
    assert "eval/kl" in json.loads(shown.stdout)["reports/evaluate/metrics.json"]
    drawn = run(["dvc", "plots", "diff", *pair, "-o", str(tmp_path / "plots")], home)
    assert drawn.returncode == 0, drawn.stderr
    page = (tmp_path / "plots" / "index.html").read_text()
    assert all(f'"rev": "{branch}"' in page for branch in pair)
    listed = run(["dvc", "exp", "show", "-a", "--csv"], home)
    assert all(branch in listed.stdout for branch in pair), listed.stdout
