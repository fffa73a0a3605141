"""Proofs that take minutes each: `make test-slow`."""

from __future__ import annotations

import json

import pytest

from .checkouts import make_checkout, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def metrics(checkout, stage):
    return json.loads((checkout / "reports" / stage / "metrics.json").read_text())


def test_default_model_is_dequantised_to_one_that_knows_things(root, tmp_path):
    checkout = make_checkout(root, tmp_path)
    for stage in ("prepare", "base"):
        done = run(["rlhf", stage], checkout)
        assert done.returncode == 0, done.stderr[-2000:]
    question = ["-m", "What is the capital of France?", "--model", "base", "--temperature", "0.01"]
    done = run(["rlhf", "chat", *question], checkout)
    assert "Paris" in done.stdout, done.stdout + done.stderr


def test_full_finetuning_end_to_end(root, tmp_path):
    checkout = make_checkout(root, tmp_path)
    done = run(["rlhf", "run", "--profile", "smoke", "-S", "model.finetuning=full"], checkout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (checkout / "models" / "policy" / "adapter").exists()
    assert metrics(checkout, "ppo")["ppo/num_updates"] == 3
    assert metrics(checkout, "sft")["sft/eval_loss"] < metrics(checkout, "sft")["sft/eval_loss_before"]


def test_default_profile_learns_what_the_judge_likes(root, tmp_path):
    checkout = make_checkout(root, tmp_path)
    done = run(["rlhf", "run"], checkout, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    reward, evaluation = metrics(checkout, "reward"), metrics(checkout, "evaluate")
    assert reward["reward/accuracy_low"] > reward["reward/length_baseline_accuracy"]
    assert evaluation["eval/gold_gain_over_sft_low"] > 0
    assert evaluation["eval/kl_high"] < evaluation["eval/kl_budget"]
    for perf in checkout.glob(".rlhf/runs/*/perf.json"):
        assert json.loads(perf.read_text())["perf/peak_memory_gib"] <= 6.0, perf
