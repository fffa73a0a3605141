"""What a run would do, from a small DVC pipeline with the names of ours, and from the real one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from rlhf_core.config import load_params
from rlhf_core.errors import InputError
from rlhf_core.stages import STAGES
from tasks.plan import plan, rows, summary

CHAIN = {"prepare": ("run", "data"), "sft": ("sft",), "ppo": ("ppo", "sft.max_length")}


def dvc(where, *words):
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *words], cwd=where, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """Three stages that have run, each reading what the one before it wrote."""
    home = tmp_path_factory.mktemp("home")
    subprocess.run(["git", "init", "-q"], cwd=home, check=True)
    (home / "params.yaml").write_text((root / "params.yaml").read_text())
    (home / "source").write_text("text")
    dvc(home, "init", "-q")
    stages, before = {}, "source"
    for name, params in CHAIN.items():
        out = f"{name}.out"
        stages[name] = {"cmd": f"cp {before} {out}", "params": [*params], "deps": [before], "outs": [out]}
        before = out
    (home / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    dvc(home, "repro", "-q")
    for name, seconds in (("sft", 200.0), ("ppo", 40.0)):
        run_dir = home / ".rlhf" / "runs" / name
        run_dir.mkdir(parents=True)
        (run_dir / "perf.json").write_text(json.dumps({"perf/seconds": seconds}))
    return home


def reasons(planned):
    return {item.stage: item.reasons for item in planned if item.runs}


def test_nothing_to_do_after_a_run(finished):
    planned = plan(finished, "", [])
    assert [item.stage for item in planned] == list(CHAIN)
    assert reasons(planned) == {}
    assert summary(planned) == "Nothing to do: every stage is up to date."
    assert {row["would"] for row in rows(planned)} == {"be skipped"}


def test_a_wished_value_runs_the_stages_that_read_it_and_those_after(finished):
    text = (finished / "params.yaml").read_text()
    old = load_params(finished / "params.yaml").sft.max_length
    planned = plan(finished, "", ["sft.max_length=99"])
    told = f"sft.max_length was {old}, is 99"
    assert reasons(planned) == {"sft": [told], "ppo": [told, "sft runs before it"]}
    assert summary(planned).startswith("2 of 3 stages would run, about 4 min as these stages took last time;")
    assert (finished / "params.yaml").read_text() == text
    assert reasons(plan(finished, "", ["ppo.gamma=0.5"])) == {"ppo": ["ppo.gamma was 1.0, is 0.5"]}


def test_what_changed_on_disk_is_named(finished, tmp_path):
    (finished / "source").write_text("other text")
    found = reasons(plan(finished, "", []))
    (finished / "source").write_text("text")
    assert found["prepare"] == ["source changed"]
    assert found["sft"] == ["prepare runs before it"]
    (finished / "ppo.out").rename(tmp_path / "ppo.out")
    found = reasons(plan(finished, "", []))
    (tmp_path / "ppo.out").rename(finished / "ppo.out")
    assert found == {"ppo": ["ppo.out is missing"]}


def test_a_value_that_is_not_valid_is_refused(finished):
    with pytest.raises(InputError, match=r"ppo.gamma = 7"):
        plan(finished, "", ["ppo.gamma=7"])


def test_before_the_first_run_every_stage_of_the_project_would_run(root, tmp_path):
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).write_text((root / name).read_text())
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    dvc(tmp_path, "init", "-q")
    planned = plan(tmp_path, "", [])
    assert [item.stage for item in planned] == list(STAGES)
    assert all(item.reasons[0] == "it has not run yet" for item in planned)
    assert summary(planned).startswith(f"{len(STAGES)} of {len(STAGES)} stages would run, time unknown;")
