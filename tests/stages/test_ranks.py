"""Two processes take the steps of one."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
import yaml

from rlhf_core import ranks
from rlhf_core.errors import InputError

from .toy import make_workspace, weights

MODELS = {"sft": "sft", "reward": "reward", "ppo": "policy"}
STAGE = [sys.executable, "-m", "rlhf_core.cli"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def make(root, directory, params, processes=1, sharding="none", **changes):
    layout = make_workspace(root, directory)
    tree = params.model_dump(mode="json", by_alias=True)
    tree["run"] |= {"num_processes": processes, "sharding": sharding}
    for section, values in changes.items():
        tree[section] |= values
    layout.params.write_text(yaml.safe_dump(tree))
    return layout


def environment():
    return os.environ | {"RLHF_TRACKING": "off", "OMP_NUM_THREADS": "1"}


def run(layout, command):
    done = subprocess.run(
        command, cwd=layout.root, env=environment(), capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def history(layout, stage):
    lines = (layout.run_dir(stage) / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def perf(layout, stage):
    return json.loads((layout.run_dir(stage) / "perf.json").read_text())


def assert_same_course(one, two, stage):
    """The same metrics at every step, and the same weights, up to the order of float32 sums."""
    assert [perf(layout, stage)["perf/num_processes"] for layout in (one, two)] == [1, 2]
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


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one(tmp_path, tiny_model_dir, small_params):
    one = make(tmp_path / "one", tiny_model_dir, small_params)
    two = make(tmp_path / "two", tiny_model_dir, small_params, processes=2)
    run(one, [*STAGE, "reward"])
    for layout in (one, two):
        shutil.copytree(one.model("sft"), layout.model("policy"))
    shutil.copytree(one.model("reward"), two.model("reward"))
    for stage in ("preferences", "evaluate"):
        found = []
        for layout in (one, two):
            run(layout, [*STAGE, stage])
            metrics = json.loads(layout.metrics(stage).read_text())
            found.append({name: math.nan if value is None else value for name, value in metrics.items()})
        assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-3, nan_ok=True)
        assert [perf(layout, stage)["perf/num_processes"] for layout in (one, two)] == [1, 2]
    pairs = [(w.preferences / "train.parquet").read_bytes() for w in (one, two)]
    assert pairs[0] == pairs[1]


SLOW = pytest.mark.slow
SHARDED = [
    pytest.param("weights", "lora", False, ["ppo"], id="weights-lora-ppo"),
    pytest.param("moments", "full", False, ["ppo"], id="moments-full-ppo"),
    *(pytest.param("weights", *how, list(MODELS), marks=SLOW) for how in (("lora", True), ("full", False))),
    pytest.param("moments", "lora", False, list(MODELS), marks=SLOW),
]


@pytest.mark.parametrize(("sharding", "finetuning", "recomputed", "stages"), SHARDED)
def test_two_processes_that_share_the_work_and_the_memory_take_the_steps_of_one(
    request, tmp_path, tiny_model_dir, small_params, sharding, finetuning, recomputed, stages
):
    """FSDP2 and ZeRO; batches do not divide evenly, so one rank makes passes that do not count, or none."""
    if sharding == "moments":
        request.getfixturevalue("deepspeed")
    changes = {
        "model": {"finetuning": finetuning, "gradient_checkpointing": recomputed},
        "sft": {"learning_rate": 1e-3, "batch_size": 6, "micro_batch_size": 2, "keep": "best"},
        "reward": {"learning_rate": 1e-3, "ensemble_size": 2},
        "ppo": {
            "learning_rate": 1e-4,
            "critic_learning_rate": 1e-4,
            "num_updates": 3,
            "ema_decay": 0.5,
            "ptx_coef": 0.1,
            "ptx_batch_size": 3,
            "micro_batch_size": 2,
        },
    }
    one = make(tmp_path / "one", tiny_model_dir, small_params, **changes)
    two = make(tmp_path / "two", tiny_model_dir, small_params, processes=2, sharding=sharding, **changes)
    for stage in MODELS:
        if stage in stages:
            run(one, [*STAGE, stage])
            run(two, [*STAGE, stage])
            assert_same_course(one, two, stage)
            assert perf(two, stage)["perf/held_moments"] < 0.8
        elif stage == "reward":
            run(one, [*STAGE, stage])
            shutil.copytree(one.model(stage), two.model(stage))


@pytest.mark.parametrize(
    "config", [*(pytest.param(c, marks=pytest.mark.slow) for c in ("ddp", "deepspeed")), "fsdp2"]
)
def test_accelerate_launch_does_the_same(request, tmp_path, tiny_model_dir, small_params, root, config):
    if config == "deepspeed":
        request.getfixturevalue("deepspeed")
    changes = {"sft": {"learning_rate": 1e-3, "num_epochs": 1}}
    one = make(tmp_path / "one", tiny_model_dir, small_params, **changes)
    two = make(tmp_path / "two", tiny_model_dir, small_params, **changes)
    run(one, [*STAGE, "sft"])
    file = root / "configs" / "accelerate" / f"{config}.yaml"
    port = str(20000 + os.getpid() % 20000)
    run(two, [*LAUNCH, "--config_file", str(file), "--main_process_port", port, "-m", "rlhf_core.cli", "sft"])
    assert_same_course(one, two, "sft")
    assert (perf(two, "sft")["perf/held_moments"] < 0.8) == (config != "ddp")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu", "single_gpu"])
def test_accelerate_launch_of_one_process(tmp_path, tiny_model_dir, small_params, root, config):
    one = make(tmp_path / "one", tiny_model_dir, small_params, sft={"num_epochs": 1})
    file = root / "configs" / "accelerate" / f"{config}.yaml"
    run(one, [*LAUNCH, "--config_file", str(file), "-m", "rlhf_core.cli", "sft"])
    assert perf(one, "sft")["perf/num_processes"] == 1


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            "zero_stage is 3, must be 1",
        ),
        (
            {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1",
                "ACCELERATE_DEEPSPEED_CONFIG_FILE": "mine.json",
            },
            "deepspeed_config_file is mine.json, must be none",
        ),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version is 1, must be 2"),
    ],
)
def test_what_a_launcher_asks_for_in_vain_is_refused(monkeypatch, asked, reason):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=reason):
        ranks.sharding()


@pytest.mark.parametrize("size", range(1, 8))
def test_ranks_that_share_weights_make_as_many_passes(monkeypatch, size):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(ranks.share_passes(range(size)))
    assert len({len(share) for share in shares}) == 1
    counted = [item for share in shares for item, weight in share if weight == 1.0]
    assert sorted(counted) == list(range(size))
    assert {weight for share in shares for _, weight in share} <= {0.0, 1.0}


def ranks_of(process):
    found = psutil.Process(process.pid).children(recursive=True)
    return {
        int(p.environ()["RANK"]): p for p in found if "rlhf_core.cli" in p.cmdline() and "RANK" in p.environ()
    }


@pytest.mark.parametrize("sharding", ["none", pytest.param("weights", marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_the_others_with_one_error(tmp_path, tiny_model_dir, small_params, sharding):
    sft = {"num_epochs": 2000}
    layout = make(tmp_path / "two", tiny_model_dir, small_params, processes=2, sharding=sharding, sft=sft)
    process = subprocess.Popen(
        [*STAGE, "sft"], cwd=layout.root, env=environment(), stderr=subprocess.PIPE, text=True
    )
    file = layout.run_dir("sft") / "history.jsonl"
    deadline = time.monotonic() + 90
    while not (file.exists() and file.read_text().count("\n") > 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    found = ranks_of(process)
    assert sorted(found) == [0, 1]
    found[1].send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "error: sft: process 2 of 2" in errors
    assert "ended with signal 9; the others were stopped" in errors
    assert "Traceback" not in errors
    assert not any(p.is_running() for p in found.values())
    assert not layout.model("sft").joinpath(".partial").exists()


def test_an_error_that_all_meet_is_told_once(tmp_path, tiny_model_dir, small_params):
    layout = make(tmp_path / "two", tiny_model_dir, small_params, processes=2)
    layout.prepared_file("demonstrations", "train").unlink()
    done = subprocess.run(
        [*STAGE, "sft"],
        cwd=layout.root,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode not in (0, 1)
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
