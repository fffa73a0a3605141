"""A workspace in which the training stages run on a tiny model in seconds."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from rlhf_core.data.rows import write_rows
from rlhf_core.layout import Layout

GOOD, BAD = "that is great! i love the sea and the sun.", "no, i do not like rain, it is sad and bad."


def make_workspace(root, model):
    layout = Layout(root)
    for name in ("base", "pretrained", "sft"):
        shutil.copytree(model, layout.model(name))
    asked = [f"how are you on day {i}?" for i in range(40)]
    rows = [
        {"prompt": text, "messages": [{"role": "user", "content": text}], "source": "test", "row": i}
        for i, text in enumerate(asked)
    ]
    for split, part in (("train", rows[:32]), ("eval", rows[32:])):
        write_rows(
            layout.prepared_file("demonstrations", split),
            [r | {"response": GOOD} for r in part],
            "demonstrations",
        )
        write_rows(layout.prepared_file("prompts", split), part, "prompts")
        pairs = [r | {"chosen": GOOD, "rejected": BAD, "source": "ai:vader"} for r in part]
        for file in (layout.preferences / f"{split}.parquet", layout.prepared_file("preferences", split)):
            write_rows(file, pairs, "preferences")
    return layout


class Killed(BaseException):
    """Stands for a signal: nothing in the code may catch it."""


def run_broken_off(monkeypatch, owner, name, at, work):
    """Run `work` until the call number `at`, from 0, of `owner.name`, which is its end."""
    real, calls = getattr(owner, name), []

    def dying(*arguments):
        if len(calls) == at:
            raise Killed
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(owner, name, dying)
    with pytest.raises(Killed):
        work()
    monkeypatch.setattr(owner, name, real)


def weights(directory):
    return load_file(directory / "model.safetensors")


def assert_same_outputs(one, other, stage, model):
    for name, tensor in weights(one.model(model)).items():
        assert torch.equal(tensor, weights(other.model(model))[name]), name
    for file in (one.metrics(stage), one.history(stage)):
        assert file.read_bytes() == (other.root / file.relative_to(one.root)).read_bytes()
