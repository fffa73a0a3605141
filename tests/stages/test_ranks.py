"""Two processes take the steps of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
import yaml

from .toy import make_workspace, weights

MODELS = {"sft": "sft", "reward": "reward", "ppo": "policy"}
ENV = os.environ | {"RLHF_TRACKING": "off", "OMP_NUM_THREADS": "1"}
STAGE = [sys.executable, "-m", "rlhf_core.cli"]
# --multi_gpu is accelerate's name for several processes on one machine; without a GPU they talk by gloo.
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def make(root, directory, params, processes=1, **changes):
    layout = make_workspace(root, directory)
    tree = params.model_dump(mode="json", by_alias=True)
    tree["run"]["num_processes"] = processes
    for section, values in changes.items():
        tree[section] |= values
    layout.params.write_text(yaml.safe_dump(tree))
    return layout


def run(layout, command):
    done = subprocess.run(
        command, cwd=layout.root, env=ENV, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def history(layout, stage):
    lines = (layout.run_dir(stage) / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_course(one, two, stage):
    """The same metrics at every step, and the same weights, up to the order of float32 sums."""
    perf = [json.loads((layout.run_dir(stage) / "perf.json").read_text()) for layout in (one, two)]
    assert [p["perf/num_processes"] for p in perf] == [1, 2]
    assert len(history(one, stage)) == len(history(two, stage)) > 2
    for a, b in zip(history(one, stage), history(two, stage), strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=2e-4)
    for name, tensor in weights(one.model(MODELS[stage])).items():
        torch.testing.assert_close(
            tensor, weights(two.model(MODELS[stage]))[name], rtol=1e-2, atol=2e-3, msg=name
        )


@pytest.mark.parametrize("finetuning", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_two_processes_take_the_steps_of_one(tmp_path, tiny_model_dir, small_params, finetuning):
    """All three trainings. Rates are low: Adam makes a whole step of a rounding error in a tiny gradient."""
    changes = {
        "model": {"finetuning": finetuning},
        "sft": {"learning_rate": 1e-3, "packing": True},
        "reward": {"learning_rate": 1e-3},
        "ppo": {"learning_rate": 1e-4, "critic_learning_rate": 1e-4, "num_updates": 3},
    }
    one = make(tmp_path / "one", tiny_model_dir, small_params, **changes)
    two = make(tmp_path / "two", tiny_model_dir, small_params, processes=2, **changes)
    for stage in MODELS:
        for layout in (one, two):
            run(layout, [*STAGE, stage])
        assert_same_course(one, two, stage)
        assert not list(two.run_dir(stage).glob("**/checkpoints/step-*"))
    texts = [(w.run_dir("ppo") / "rollout_samples.table.json").read_text() for w in (one, two)]
    assert texts[0] == texts[1]


def test_accelerate_launch_does_the_same(tmp_path, tiny_model_dir, small_params):
    changes = {"sft": {"learning_rate": 1e-3, "num_epochs": 1}}
    one = make(tmp_path / "one", tiny_model_dir, small_params, **changes)
    two = make(tmp_path / "two", tiny_model_dir, small_params, **changes)
    run(one, [*STAGE, "sft"])
    port = str(20000 + os.getpid() % 20000)
    run(two, [*LAUNCH, "--main_process_port", port, "-m", "rlhf_core.cli", "sft"])
    assert_same_course(one, two, "sft")


def ranks_of(process):
    found = psutil.Process(process.pid).children(recursive=True)
    return {
        int(p.environ()["RANK"]): p for p in found if "rlhf_core.cli" in p.cmdline() and "RANK" in p.environ()
    }


def test_a_process_that_dies_ends_the_others_with_one_error(tmp_path, tiny_model_dir, small_params):
    layout = make(tmp_path / "two", tiny_model_dir, small_params, processes=2, sft={"num_epochs": 2000})
    process = subprocess.Popen([*STAGE, "sft"], cwd=layout.root, env=ENV, stderr=subprocess.PIPE, text=True)
    file = layout.run_dir("sft") / "history.jsonl"
    deadline = time.monotonic() + 90
    while not (file.exists() and file.read_text().count("\n") > 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ranks = ranks_of(process)
    assert sorted(ranks) == [0, 1]
    ranks[1].send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "error: sft: process 2 of 2" in errors
    assert "ended with signal 9; the others were stopped" in errors
    assert "Traceback" not in errors
    assert not any(p.is_running() for p in ranks.values())
    assert not layout.model("sft").joinpath(".partial").exists()


def test_an_error_that_all_meet_is_told_once(tmp_path, tiny_model_dir, small_params):
    layout = make(tmp_path / "two", tiny_model_dir, small_params, processes=2)
    layout.prepared_file("demonstrations", "train").unlink()
    done = subprocess.run(
        [*STAGE, "sft"], cwd=layout.root, env=ENV, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode not in (0, 1)
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
