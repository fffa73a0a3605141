"""A candidate and the gate, by commands. How one becomes the champion: test_end_to_end.py."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_core.mlflow_writer import open_client

from .checkouts import run

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
