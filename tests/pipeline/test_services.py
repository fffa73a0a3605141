"""What `make up` and `mlflow models serve` start, and that they stop."""

from __future__ import annotations

import hashlib
import signal
import socket

from mlflow import MlflowClient

from tasks import gpus
from tasks.network import free_port

from .checkouts import processes_below, run, start, wait_for
from .prefect_api import page, post
from .services import RunHere, serving


def test_up_starts_everything_runs_the_deployment_and_stops_cleanly(finished, tmp_path):
    checkout, _ = finished
    with serving(checkout, tmp_path / "up.log") as services:
        assert "Sign in" in page(services.feedback)
        assert "html" in page(services.url)
        assert "html" in page(services.mlflow)
        what_up_has_made(services.prefect)
        wrong = services.prefect.start("train", ppo={"rollout_batch_size": 33})
        assert services.prefect.follow(wrong, 60) == "FAILED"
        assert RunHere(checkout, wrong).worktree is None  # nothing is left of it that nobody would take up
        flow_run = services.prefect.start("train")
        assert services.prefect.follow(flow_run, 240) == "COMPLETED"
        what_a_run_has_left(services, flow_run)
        dry = services.prefect.start("train", dry_run=True, overrides=["ppo.gamma=0.5"])
        assert services.prefect.follow(dry, 90) == "COMPLETED"
        (planned,) = (a for a in services.prefect.post("artifacts/filter") if a["key"] == "plan")
        assert " of 9 stages would run, about " in planned["description"]
        assert "ppo.gamma was 1.0, is 0.5" in planned["data"]
    assert page(services.url) is None
    assert page(services.mlflow) is None


def what_up_has_made(prefect):
    """Deployments with their forms, pool, queues, a worker, and what the server does by itself."""
    assert prefect.deployment("train")["work_pool_name"] == "rlhf-process"
    for name in ("train", "promote", "rollback"):
        fields = prefect.deployment(name)["parameter_openapi_schema"]["properties"]
        assert not any("anyOf" in field for field in fields.values())  # the form would show a type switcher
    fields = prefect.deployment("train")["parameter_openapi_schema"]["properties"]
    assert fields["profile"]["enum"] == ["keep", "default", "smoke"]
    (pool,) = prefect.post("work_pools/filter")
    assert pool["type"] == "process"
    queues = prefect.post("work_pools/rlhf-process/queues/filter")
    limits = {queue["name"]: queue["concurrency_limit"] for queue in queues}
    assert (limits["cpu"], limits["gpu"]) == (2, max(1, len(gpus.visible())))
    automations = prefect.post("automations/filter")
    names = {"rlhf: mark silent runs as crashed", "rlhf: compare new candidates"}
    assert {automation["name"] for automation in automations if automation["enabled"]} >= names
    wait_for(lambda: prefect.post("work_pools/rlhf-process/workers/filter"), 60)


def what_a_run_has_left(services, flow_run):
    """On the pages of Prefect, in the registry, and in git."""
    artifacts = services.prefect.artifacts(flow_run).values()
    assert any("kept" in str(data) and "reports/evaluation" in str(data) for data in artifacts)
    assert "finished" in run(["rlhf", "runs"], services.checkout).stdout
    tags = MlflowClient(services.mlflow).get_model_version_by_alias("rlhf-policy", "candidate").tags
    assert tags["prefect.flow_run"] == flow_run
    assert tags["prefect.url"].startswith(services.url)
    lock = run(["git", "show", f"{tags['git.commit']}:dvc.lock"], services.checkout).stdout
    assert hashlib.md5(lock.encode()).hexdigest() == tags["dvc.lock.md5"]
    assert "models/policy" in lock


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
