"""A run that is killed goes on from its last checkpoint, and ends with the bytes of a run that was not."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from rlhf_core.mlflow_writer import open_client
from rlhf_core.stages import STAGES

from .checkouts import clone_with_cache, commit, processes_below, run, start, wait_for


@pytest.fixture(scope="module")
def clone(finished, tmp_path_factory):
    """A fresh clone of the commit that keeps the finished run; nobody has a policy or its evaluation."""
    checkout, _ = finished
    commit(checkout, "keep the run")
    target = clone_with_cache(checkout, tmp_path_factory.mktemp("clone") / "rlhf", ("ppo", "evaluate"))
    assert not (target / "models").exists()
    return target


def test_killed_run_goes_on_and_gives_the_same_bytes(clone, finished, tmp_path):
    flow = start(["rlhf", "run"], clone, tmp_path / "flow.log")
    checkpoints = clone / ".rlhf" / "runs" / "ppo" / "checkpoints"
    try:
        wait_for(lambda: flow.poll() is not None or (clone / "models" / "base").exists())
        busy = run(["rlhf", "run"], clone)
        assert busy.returncode == 1
        assert f"another run works here (process {flow.pid})" in busy.stderr
        wait_for(lambda: flow.poll() is not None or list(checkpoints.glob("*/*.json")))
        assert flow.poll() is None, (tmp_path / "flow.log").read_text()[-2000:]
    finally:
        below = processes_below(clone)
        flow.send_signal(signal.SIGKILL)
        flow.wait()
    wait_for(lambda: not processes_below(clone), 30)  # nothing trains unseen, nor is the server left
    # DVC takes the lock of a process for held until somebody has asked how it ended.
    wait_for(lambda: not any(Path(f"/proc/{number}").exists() for number in below), 60)
    assert not (clone / "models" / "policy").exists()

    done = run(["dvc", "repro"], clone)  # without Prefect this time
    assert done.returncode == 0, done.stderr[-2000:]
    checkout, _ = finished
    assert "Running stage 'evaluate'" in done.stdout
    for stage in ("ppo", "evaluate"):
        name = f"reports/{stage}/metrics.json"
        assert (clone / name).read_bytes() == (checkout / name).read_bytes(), name
    changed = run(["git", "status", "--porcelain"], clone).stdout
    assert changed == "", "dvc.lock holds the hash of every output"


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_stopped_flow_stops_its_training_and_says_how_to_go_on(clone, number, tmp_path):
    steps = f"pretrain.num_steps={1000 + number}"  # so that there is something to do, and for long
    assert run(["rlhf", "params", "-S", steps], clone).returncode == 0
    progress = clone / ".rlhf" / "runs" / "pretrain" / "progress.json"
    progress.unlink(missing_ok=True)
    flow = start(["rlhf", "run"], clone, tmp_path / "flow.log")
    wait_for(lambda: flow.poll() is not None or progress.exists())
    flow.send_signal(number)
    assert flow.wait(60) == 130
    said = (tmp_path / "flow.log").read_text()
    assert "interrupted; run the same command again to go on" in said
    assert "Traceback" not in said
    wait_for(lambda: not processes_below(clone), 30)
    run_id = json.loads((clone / ".rlhf" / "runs" / "pretrain" / "mlflow.json").read_text())["run"]
    assert open_client(clone).get_run(run_id).info.status == "KILLED"


IN_SHORT = ("base", "sft", "ppo")  # one that copies, one that reads data, one with several models
CTRL_C = [pytest.param(stage, marks=() if stage in IN_SHORT else pytest.mark.slow) for stage in STAGES]


@pytest.mark.parametrize("stage", CTRL_C)
def test_ctrl_c_in_any_stage_leaves_what_was_there(finished, stage, tmp_path):
    checkout, _ = finished
    progress = checkout / ".rlhf" / "runs" / stage / "progress.json"
    progress.unlink(missing_ok=True)
    log = tmp_path / "stage.log"
    process = start(["rlhf", stage], checkout, log, RLHF_TRACKING="off")
    wait_for(lambda: process.poll() is not None or progress.exists(), 60)
    process.send_signal(signal.SIGINT)
    status = process.wait(30)
    assert status == 130, log.read_text()
    assert "interrupted; run the same command again to go on" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert "up to date" in run(["dvc", "status"], checkout).stdout  # every output has the bytes it had
