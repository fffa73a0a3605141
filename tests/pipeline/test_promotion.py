"""From a registered candidate to the champion: by commands, and by the automation and the form in Prefect."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import pytest

from rlhf_core.mlflow_writer import open_client
from tasks.network import free_port

from .checkouts import commit, make_checkout, processes_below, run, start, wait_for
from .prefect_api import PrefectApi

TASTE = """
def short(prompts, responses):
    return [-len(text) / 20 for text in responses]

def few_words(prompts, responses):
    return [-len(text.split()) for text in responses]
"""
# What makes the tiny model learn to be short, and a judge that likes it.
LEARN = {
    "ppo.reward_function": "taste:short",
    "ppo.num_updates": 10,
    "ppo.learning_rate": 0.004,
    "ppo.kl_budget": 60,
    "preferences.labeler": "function",
    "preferences.labeler_target": "taste:few_words",
    "promotion.judge": "function",
    "promotion.judge_target": "taste:few_words",
    "promotion.max_kl": 100,
    "promotion.max_length_ratio": 10,
    "promotion.min_reward_accuracy": 0,
    "promotion.max_perplexity_ratio": 5,
}
WHO = ["--name", "Ann", "--reason", "reads well"]


def aliases(checkout):
    found = open_client(checkout).get_registered_model("rlhf-policy").aliases
    return {alias: str(version) for alias, version in found.items()}


def test_a_candidate_that_learnt_nothing_is_not_promoted_and_says_why(finished):
    checkout, _ = finished
    client = open_client(checkout)
    candidate = client.get_model_version("rlhf-policy", "1")
    assert candidate.tags["reward_model"] == "rlhf-policy-reward/1"
    assert candidate.tags["sft_model"] == "rlhf-policy-sft/1"
    reward = client.get_model_version("rlhf-policy-reward", "1")
    assert reward.tags["dvc.md5"] == candidate.tags["dvc.models.reward"]
    facts = json.loads(Path(reward.source.removeprefix("file://"), "provenance.json").read_text())
    assert "dvc pull models/reward" in facts["fetch"]
    done = run(["rlhf", "promote"], checkout)
    assert done.returncode == 3, done.stderr[-2000:]
    assert "The gate does not hold" in done.stdout
    refused = run(["rlhf", "approve", *WHO], checkout)
    assert refused.returncode == 2
    assert "no promotion waits for a decision" in refused.stderr
    assert "champion" not in aliases(checkout)
    assert "failed" in run(["rlhf", "promotions"], checkout).stdout


@pytest.fixture(scope="module")
def taught(root, tmp_path_factory):
    """A checkout whose candidate is better than SFT in the eyes of its judge."""
    checkout = make_checkout(root, tmp_path_factory.mktemp("taught"))
    (checkout / "taste.py").write_text(TASTE)
    commit(checkout, "taste")
    options = [word for key, value in LEARN.items() for word in ("-S", f"{key}={value}")]
    done = run(["rlhf", "run", "--profile", "smoke", *options], checkout, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return checkout


def start_up(checkout, log):
    ports = {"RLHF_PREFECT_PORT": str(free_port(4710)), "RLHF_MLFLOW_PORT": str(free_port(5710))}
    up = start(["rlhf", "up"], checkout, log, **ports)
    wait_for(lambda: up.poll() is not None or "Ctrl-C stops" in log.read_text(), 180)
    assert up.poll() is None, log.read_text()
    return up, re.findall(r"http://127\.0\.0\.1:\d+", log.read_text())[0]


def stop(up):
    up.send_signal(signal.SIGINT)
    assert up.wait(60) == 0


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_an_event_starts_the_comparison_and_a_person_approves_after_a_restart(taught, tmp_path):
    up, prefect = start_up(taught, tmp_path / "up.log")
    try:
        api = PrefectApi(prefect)
        found = {d["name"]: d for d in api.post("deployments/filter")}
        assert set(found) >= {"train", "promote", "rollback"}
        fields = found["promote"]["parameter_openapi_schema"]["properties"]
        assert not any("anyOf" in field for field in fields.values())
        announce = "from tasks.registry import announce; announce('rlhf-policy', '1')"
        sent = run([sys.executable, "-c", announce], taught, PREFECT_API_URL=f"{prefect}/api")
        assert sent.returncode == 0, sent.stderr
        wanted = {"deployments": {"id": {"any_": [found["promote"]["id"]]}}}
        (waiting,) = wait_for(lambda: api.post("flow_runs/filter", wanted), 90)
        assert waiting["parameters"]["version"] == "1"
        ends = ("PAUSED", "COMPLETED", "FAILED", "CRASHED")
        path = f"flow_runs/{waiting['id']}"
        wait_for(lambda: api.state(waiting["id"]) in ends, 240)
        assert api.get(path)["state_name"] == "Suspended"
        wait_for(lambda: not [c for c in processes_below(taught).values() if "prefect.engine" in c], 60)
        given = api.post(f"{path}/input/filter", {"prefix": "suspended", "limit": 10})
        assert any("against its SFT model" in str(entry["value"]) for entry in given)
        assert "champion" not in aliases(taught)
    finally:
        stop(up)
    up, prefect = start_up(taught, tmp_path / "again.log")
    try:
        api = PrefectApi(prefect)
        assert api.get(path)["state_name"] == "Suspended"
        empty = api.post(f"{path}/resume", {"run_input": {"decision": "approve", "name": "", "reason": "x"}})
        assert empty["status"] == "REJECT"
        answer = {"run_input": {"decision": "approve", "name": "Ann", "reason": "reads well"}}
        assert api.post(f"{path}/resume", answer)["status"] == "ACCEPT"
        wait_for(lambda: api.state(waiting["id"]) in ends[1:], 240)
        assert api.state(waiting["id"]) == "COMPLETED"
    finally:
        stop(up)
    assert aliases(taught) == {"candidate": "1", "champion": "1"}
    tags = open_client(taught).get_model_version("rlhf-policy", "1").tags
    assert (tags["promotion.by"], tags["promotion.reason"]) == ("Ann", "reads well")
    again = run(["rlhf", "promote"], taught)
    assert "version 1 is the champion already" in again.stderr
