"""The whole of it through real servers and a real worker: form values, two runs at once, cancel, and every
kind of death. Only what the pages can do is done, through the API that they use.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import subprocess
import urllib.error

import psutil
import pytest
import yaml
from mlflow import MlflowClient

from rlhf_core.stages import STAGES
from tasks.network import free_port

from .checkouts import make_checkout, processes_below, run, start, wait_for
from .prefect_api import PrefectApi

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CANCEL_SECONDS = 30
CRASH_SECONDS = 300
LONG_SFT = ["sft.num_epochs=30", "sft.eval_every=100", "sft.checkpoint_seconds=1"]


class Services:
    """`rlhf up` in a checkout; it can be killed like a machine that loses its power, and started again."""

    def __init__(self, checkout, log):
        self.checkout, self.log = checkout, log
        self.ports = {"RLHF_PREFECT_PORT": str(free_port(4650)), "RLHF_MLFLOW_PORT": str(free_port(5650))}
        self.start()

    def start(self):
        self.up = start(["rlhf", "up"], self.checkout, self.log, **self.ports)
        wait_for(lambda: self.up.poll() is not None or "Ctrl-C stops" in self.log.read_text(), 240)
        assert self.up.poll() is None, self.log.read_text()
        prefect, self.mlflow = re.findall(r"http://127\.0\.0\.1:\d+", self.log.read_text())[:2]
        self.prefect = PrefectApi(prefect)

    def lose_power(self):
        """Nothing gets a chance to say anything, and nothing of it goes on."""
        while victims := [p for p in (self.up.pid, *processes_below(self.checkout)) if alive(p)]:
            for pid in victims:
                kill(pid)
        self.up.wait()

    def stop(self):
        self.up.send_signal(signal.SIGINT)
        assert self.up.wait(90) == 0, self.log.read_text()


def kill(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def alive(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture(scope="module")
def services(root, tmp_path_factory):
    checkout = make_checkout(root, tmp_path_factory.mktemp("orchestration") / "rlhf")
    found = Services(checkout, checkout.parent / "up.log")
    try:
        yield found
    finally:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            found.stop()
        found.lose_power()


def worktree_of(checkout, flow_run):
    (found,) = (checkout / ".rlhf" / "worktrees").glob(f"*-{flow_run.replace('-', '')[:8]}")
    return found


def working_on(checkout, flow_run):
    """The processes of a run's training, by number: DVC, the shell it starts, the stage."""
    with contextlib.suppress(ValueError):
        return processes_below(worktree_of(checkout, flow_run))
    return {}


def trains(checkout, flow_run, stage):
    """Whether the stage of the run has saved a checkpoint, and goes on."""
    with contextlib.suppress(ValueError):
        run_dir = worktree_of(checkout, flow_run) / ".rlhf" / "runs" / stage
        return list((run_dir / "checkpoints").glob("[!.]*/*.json"))  # not one that is being written
    return []


def first_steps(log, stage):
    """The step at which each attempt of the stage began, as its progress bar says; 0 is the beginning."""
    attempts = log.read_text().split(f"> rlhf {stage}\n")[1:]
    bars = [re.search(rf"{stage}: .*?\| (\d+)/\d+ \[", attempt) for attempt in attempts]
    return [int(bar.group(1)) for bar in bars if bar]


def kept(checkout, flow_run):
    (found,) = (checkout / ".rlhf" / "kept").glob(f"*-{flow_run.replace('-', '')[:8]}")
    return found


def committed(checkout, flow_run, name):
    done = run(["git", "show", f"runs/{kept(checkout, flow_run).name}:{name}"], checkout)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def test_two_runs_at_once_from_the_form_are_seen_and_end_well(services):
    prefect, checkout = services.prefect, services.checkout
    with pytest.raises(urllib.error.HTTPError, match=r"409|422"):
        prefect.start("train", profile="smoke", ppo={"kl_coef": -1})
    wrong = prefect.start("train", profile="smoke", ppo={"rollout_batch_size": 33})
    typed = {0.3: None, 0.07: None}
    for price in typed:
        typed[price] = prefect.start("train", profile="smoke", ppo={"kl_coef": price}, reward={})
    wait_for(lambda: all(working_on(checkout, flow_run) for flow_run in typed.values()), 300)
    assert [prefect.state(flow_run) for flow_run in typed.values()] == ["RUNNING"] * 2
    assert len({worktree_of(checkout, flow_run) for flow_run in typed.values()}) == 2
    assert prefect.follow(wrong) == "FAILED"
    assert (
        "ppo.rollout_batch_size (33) must be a multiple"
        in prefect.get(f"flow_runs/{wrong}")["state"]["message"]
    )

    for price, flow_run in typed.items():
        assert prefect.follow(flow_run) == "COMPLETED"
        assert committed(checkout, flow_run, "params.yaml")["ppo"]["kl_coef"] == price
        assert committed(checkout, flow_run, "params.yaml")["ppo"]["num_updates"] == 3  # the profile's
        assert set(STAGES) <= set(prefect.tasks(flow_run))
    assert (checkout / "params.yaml").read_text() == run(["git", "show", "HEAD:params.yaml"], checkout).stdout

    flow_run = typed[0.3]
    artifacts = prefect.artifacts(flow_run)
    for stage in STAGES:
        assert artifacts[f"{stage}-progress"] == 100
        assert json.loads(artifacts[f"{stage}-metrics"])
        log = kept(checkout, flow_run) / ".rlhf" / "runs" / stage / "output.log"
        assert f"`{log}`" in artifacts[f"{stage}-log"]
        assert log.is_file()
    for stage in ("pretrain", "sft", "reward", "ppo"):
        picture = re.fullmatch(r"!\[.*\]\(data:image/png;base64,(.*)\)", artifacts[f"{stage}-curves"])
        assert base64.b64decode(picture.group(1)).startswith(b"\x89PNG")
    for table in ("sft-training-samples", "preferences-preference-samples", "reward-held-out-pairs"):
        assert json.loads(artifacts[table])
    assert json.loads(artifacts["ppo-rollout-samples"])
    assert json.loads(artifacts["evaluate-samples"])

    client = MlflowClient(services.mlflow)
    link = artifacts["mlflow-run"]
    parent = client.get_run(re.search(r"/runs/(\w+)", link).group(1))
    assert f"/flow-runs/flow-run/{flow_run})" in parent.data.tags["mlflow.note.content"]
    assert services.mlflow in artifacts["ppo-log"]
    child = re.search(r"/runs/(\w+)/artifacts/output.log", artifacts["ppo-log"]).group(1)
    assert client.get_run(child).data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert "output.log" in [file.path for file in client.list_artifacts(child)]


def test_cancel_stops_the_training_and_all_that_it_started(services):
    prefect, checkout = services.prefect, services.checkout
    flow_run = prefect.start("train", profile="smoke", sft={"num_epochs": 5000}, overrides=LONG_SFT[1:])
    wait_for(lambda: trains(checkout, flow_run, "sft"), 600)
    victims = working_on(checkout, flow_run)
    assert any("dvc" in command for command in victims.values())
    assert any("rlhf sft" in command for command in victims.values())
    prefect.cancel(flow_run)
    wait_for(lambda: not any(alive(pid) for pid in victims), CANCEL_SECONDS)
    wait_for(lambda: prefect.state(flow_run) == "CANCELLED", CANCEL_SECONDS)
    assert working_on(checkout, flow_run) == {}
    note = json.loads((kept(checkout, flow_run) / "run.json").read_text())
    assert note["state"] == "stopped"


def test_a_run_outlives_its_training_its_server_its_worker_and_its_machine(services):
    prefect, checkout = services.prefect, services.checkout
    flow_run = prefect.start(
        "train", profile="smoke", run={"seed": 11}, ppo={"num_updates": 6}, overrides=LONG_SFT
    )

    # The training process is killed, as by a kernel that is out of memory: the stage is tried again.
    wait_for(lambda: trains(checkout, flow_run, "sft"), 600)
    (training,) = (p for p, command in working_on(checkout, flow_run).items() if "rlhf sft" in command)
    kill(training)
    log = worktree_of(checkout, flow_run) / ".rlhf" / "runs" / "sft" / "output.log"
    wait_for(lambda: len(first_steps(log, "sft")) == 2, 300)
    begun, gone_on = first_steps(log, "sft")
    assert begun == 0 < gone_on
    assert prefect.state(flow_run) == "RUNNING"

    # The Prefect server is killed: it is started again, and the run never stopped.
    (server,) = (p for p, command in processes_below(checkout).items() if "prefect server start" in command)
    before = working_on(checkout, flow_run)
    kill(server)
    wait_for(lambda: "prefect ended with status -9; starting it again" in services.log.read_text(), 60)
    assert set(before) & set(working_on(checkout, flow_run))
    wait_for(lambda: answers(prefect, flow_run), 120)
    assert prefect.state(flow_run) == "RUNNING"

    # The machine goes down while PPO trains, and comes up again: the run is marked, and Retry goes on.
    wait_for(lambda: trains(checkout, flow_run, "ppo"), 900)
    assert prefect.state(flow_run) == "RUNNING"
    services.lose_power()
    services.start()
    wait_for(lambda: prefect.state(flow_run) == "CRASHED", CRASH_SECONDS)
    services.prefect.retry(flow_run)
    wait_for(lambda: prefect.state(flow_run) == "RUNNING", 120)
    assert prefect.follow(flow_run) == "COMPLETED"

    runs = kept(checkout, flow_run) / ".rlhf" / "runs"
    assert "didn't change, skipping" in (runs / "sft" / "output.log").read_text()  # done before, not again
    begun, gone_on = first_steps(runs / "ppo" / "output.log", "ppo")
    assert begun == 0 < gone_on
    assert committed(checkout, flow_run, "reports/ppo/metrics.json")["ppo/num_updates"] == 6
    assert not (checkout / ".rlhf" / "worktrees" / runs.parents[1].name).exists()

    # The candidate is registered; promotion with approval, and rollback, take over from here.
    version = MlflowClient(services.mlflow).get_model_version_by_alias("rlhf-policy", "candidate")
    assert version.tags["prefect.flow_run"] == flow_run


def answers(prefect, flow_run):
    with contextlib.suppress(OSError):
        return prefect.state(flow_run)
    return ""
