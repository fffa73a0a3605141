"""What `make up` and `mlflow models serve` start, and that they stop."""

from __future__ import annotations

import os
import re
import signal
import socket

import pytest
from mlflow import MlflowClient

from tasks import gpus
from tasks.network import free_port

from .checkouts import processes_below, run, start, wait_for
from .prefect_api import ENDED, PrefectApi, page, post


def test_up_starts_everything_runs_the_deployment_and_stops_cleanly(finished, tmp_path):
    checkout, _ = finished
    log = tmp_path / "up.log"
    ports = {"RLHF_PREFECT_PORT": "4300", "RLHF_MLFLOW_PORT": "5300", "RLHF_FEEDBACK_PORT": "8700"}
    up = start(["rlhf", "up"], checkout, log, **ports)
    try:
        wait_for(lambda: up.poll() is not None or "Ctrl-C stops" in log.read_text(), 180)
        assert up.poll() is None, log.read_text()
        prefect, mlflow, feedback = re.findall(r"http://127\.0\.0\.1:\d+", log.read_text())[:3]
        api = PrefectApi(prefect)
        assert "Sign in" in page(feedback)
        assert "html" in page(prefect)
        assert "html" in page(mlflow)
        found = api.deployment("train")
        assert (found["name"], found["work_pool_name"]) == ("train", "rlhf-process")
        fields = found["parameter_openapi_schema"]["properties"]
        assert fields["profile"]["enum"] == ["keep", "default", "smoke"]
        assert not any("anyOf" in field for field in fields.values())  # the form would show a type switcher

        (pool,) = api.post("work_pools/filter")
        assert pool["type"] == "process"
        queues = api.post("work_pools/rlhf-process/queues/filter")
        limits = {queue["name"]: queue["concurrency_limit"] for queue in queues}
        assert (limits["cpu"], limits["gpu"]) == (2, max(1, len(gpus.visible())))
        automations = api.post("automations/filter")
        names = {"rlhf: mark silent runs as crashed", "rlhf: compare new candidates"}
        assert {automation["name"] for automation in automations if automation["enabled"]} >= names
        wait_for(lambda: api.post("work_pools/rlhf-process/workers/filter"), 60)
        flow_run = api.start("train")
        assert api.follow(flow_run, 240) == "COMPLETED"
        artifacts = api.post("artifacts/filter")
        assert any("kept" in str(a["data"]) and "reports/evaluation" in str(a["data"]) for a in artifacts)
        assert "finished" in run(["rlhf", "runs"], checkout).stdout
        client = MlflowClient(mlflow)
        tags = client.get_model_version_by_alias("rlhf-policy", "candidate").tags
        assert tags["prefect.flow_run"] == flow_run
        assert tags["prefect.url"].startswith(prefect)
        branch = f"{tags['rlhf.branch']}:dvc.lock"
        assert "models/policy" in run(["git", "show", branch], checkout).stdout

        dry = api.start("train", dry_run=True, overrides=["ppo.gamma=0.5"])
        wait_for(lambda: api.state(dry) in ENDED, 90)
        (planned,) = (a for a in api.post("artifacts/filter") if a["key"] == "plan")
        assert " of 9 stages would run, about " in planned["description"]
        assert "ppo.gamma was 1.0, is 0.5" in planned["data"]
    finally:
        up.send_signal(signal.SIGINT)
        assert up.wait(60) == 0
    assert log.read_text().rstrip().endswith("stopped")
    assert page(prefect) is None
    assert page(mlflow) is None
    wait_for(lambda: not processes_below(checkout), 20)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_that_is_killed_with_its_worker_is_marked_and_its_retry_goes_on(finished, tmp_path):
    checkout = tmp_path / "rlhf"
    run(["git", "clone", "-q", str(finished[0]), str(checkout)], tmp_path)
    log = tmp_path / "up.log"
    up = start(["rlhf", "up"], checkout, log, RLHF_PREFECT_PORT="4500", RLHF_MLFLOW_PORT="5500")
    try:
        wait_for(lambda: up.poll() is not None or "Ctrl-C stops" in log.read_text(), 180)
        api = PrefectApi(re.findall(r"http://127\.0\.0\.1:\d+", log.read_text())[0])
        flow_run = api.start("train", profile="smoke")
        worktrees = checkout / ".rlhf" / "worktrees"
        wait_for(lambda: list(worktrees.glob("*/.rlhf/runs/sft/progress.json")))
        assert api.state(flow_run) == "RUNNING"
        running = processes_below(checkout).items()
        victims = [pid for pid, name in running if "prefect worker" in name or "engine" in name]
        assert len(victims) >= 2
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: api.state(flow_run) == "CRASHED", 300)
        assert "worker ended with status -9; starting it again" in log.read_text()
        assert not any("rlhf_core" in name for name in processes_below(checkout).values())  # nothing trains

        api.retry(flow_run)
        wait_for(lambda: api.state(flow_run) in ("COMPLETED", "FAILED"), 400)
        assert api.state(flow_run) == "COMPLETED"
        assert list(worktrees.iterdir()) == []
    finally:
        up.send_signal(signal.SIGINT)
        assert up.wait(60) == 0


def test_a_port_that_is_taken_is_passed_over():
    taken = free_port(4400)
    with socket.socket() as other:
        other.bind(("127.0.0.1", taken))
        assert free_port(taken) != taken


def test_registered_policy_answers_over_http(finished, tmp_path):
    checkout, _ = finished
    log = tmp_path / "serve.log"
    options = ["-m", "models:/rlhf-policy@candidate", "--env-manager", "local", "-p", "5402"]
    store = f"sqlite:///{checkout}/mlflow.db"
    command = ["mlflow", "models", "serve", *options]
    server = start(command, checkout, log, MLFLOW_TRACKING_URI=store, MLFLOW_DISABLE_TELEMETRY="true")
    body = {"messages": [{"role": "user", "content": "how are you?"}], "max_tokens": 6, "seed": 3}
    try:
        wait_for(lambda: server.poll() is not None or page("http://127.0.0.1:5402/ping") is not None, 120)
        reply = post("http://127.0.0.1:5402/invocations", body)
        assert reply["choices"][0]["message"]["role"] == "assistant"
        assert 0 < reply["usage"]["completion_tokens"] <= 6
        again = post("http://127.0.0.1:5402/invocations", body)
        assert again["choices"] == reply["choices"]  # the seed says what is sampled
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
        for pid in processes_below(checkout):
            run(["kill", "-9", str(pid)], checkout)
