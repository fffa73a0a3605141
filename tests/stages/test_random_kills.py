"""SIGKILL at random moments, also inside a save: the training goes on and ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from .toy import assert_same_outputs, make_workspace

SLOW = [pytest.mark.slow, pytest.mark.timeout(1200)]
MODELS = {"sft": "sft", "reward": "reward", "ppo": "policy"}


def command(stage):
    return [sys.executable, "-m", "rlhf_core.cli", stage]


def environment():
    with_us = {"RLHF_DIE_WITH_PARENT": str(os.getpid())}
    return os.environ | {"RLHF_TRACKING": "off", "OMP_NUM_THREADS": "1"} | with_us


def finish(layout, stage):
    done = subprocess.run(
        command(stage), cwd=layout.root, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def kill_once(layout, stage, moment):
    """Start the stage and kill it `moment` seconds after it began to train; False when it ended before."""
    progress = layout.run_dir(stage) / "progress.json"
    progress.unlink(missing_ok=True)
    process = subprocess.Popen(command(stage), cwd=layout.root, env=environment(), stderr=subprocess.DEVNULL)
    while process.poll() is None and not progress.exists():
        time.sleep(0.01)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        ranks = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        psutil.wait_procs(ranks, timeout=30)
        return True
    return False


@pytest.mark.parametrize(
    ("stage", "kills", "run_options"),
    [
        ("ppo", 4, {}),
        *(pytest.param(stage, 20, {}, marks=SLOW) for stage in MODELS),
        *(
            pytest.param(stage, 5, {"num_processes": 2, "sharding": sharding}, marks=SLOW)
            for sharding in ("weights", "moments")
            for stage in MODELS
        ),
    ],
)
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    request, tmp_path, tiny_model_dir, small_params, stage, kills, run_options
):
    if run_options.get("sharding") == "moments":
        request.getfixturevalue("deepspeed")
    whole, broken = (make_workspace(tmp_path / name, tiny_model_dir) for name in ("whole", "broken"))
    tree = small_params.model_dump(mode="json", by_alias=True)
    tree["run"] |= run_options
    tree["sft"]["num_epochs"] = tree["reward"]["num_epochs"] = 12
    tree["ppo"] |= {"num_updates": 12, "kl_budget": 1000.0, "ema_decay": 0.5, "kl_target": 1.0}
    for layout in (whole, broken):
        layout.params.write_text(yaml.safe_dump(tree))
        if stage == "ppo":
            finish(layout, "reward")
    finish(whole, stage)
    perf = json.loads((whole.run_dir(stage) / "perf.json").read_text())
    # So that all kills together leave something to do, however fast the machine is.
    longest = (perf["perf/seconds"] - perf["perf/loading_seconds"]) / kills
    rng = random.Random(f"{stage} {kills}")
    killed = 0
    while killed < kills and kill_once(broken, stage, rng.uniform(0.0, longest)):
        killed += 1
    assert killed >= min(kills, 3)  # it may end sooner than the kills do
    if not broken.metrics(stage).exists():
        finish(broken, stage)
    assert_same_outputs(whole, broken, stage, MODELS[stage])
