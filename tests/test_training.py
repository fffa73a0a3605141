"""The shared training loop on a model of one weight: schedules, what is kept, when it stops."""

from __future__ import annotations

import pytest
import torch

from rlhf_core import training
from rlhf_core.checkpoint import Checkpoints
from rlhf_core.tracking import Tracker
from rlhf_core.training import Schedule, Task, out_of_patience, step_rows, train

PLAIN = {"batch_size": 2, "micro_batch_size": 1, "max_grad_norm": 1e9}


def schedule(**changes):
    values = {"num_steps": 10, "learning_rate": 1.0, "warmup_fraction": 0.2, "eval_every": 1}
    return Schedule(**(PLAIN | values | changes))


@pytest.mark.parametrize(
    ("decay", "rates"),
    [
        ("cosine", {0: 0.5, 1: 1.0, 2: 1.0, 6: 0.5, 10: 0.0}),
        ("linear", {0: 0.5, 1: 1.0, 2: 1.0, 4: 0.75, 6: 0.5, 10: 0.0}),
        ("constant", {0: 0.5, 1: 1.0, 2: 1.0, 9: 1.0}),
    ],
)
def test_learning_rate_by_hand(decay, rates):
    path = schedule(decay=decay)
    assert {step: path.learning_rate_at(step) for step in rates} == pytest.approx(rates)


def test_every_row_is_seen_once_an_epoch():
    for epoch in (0, 1):
        seen = [i for step in range(3) for i in step_rows(7, 3, 3 * epoch + step, seed=5)]
        assert sorted(seen) == list(range(7))
    assert step_rows(7, 3, 0, seed=5) != step_rows(7, 3, 3, seed=5)


class Pull(Task):
    """Pulls a parameter up by about 1 a step (Adam's step is the learning rate); it is best at 3."""

    def __init__(self, parameter):
        self.parameter = parameter

    def length(self, row):
        return 1

    def weight(self, rows):
        return float(len(rows))

    def loss(self, rows):
        return -self.parameter.sum() * len(rows), {}

    def evaluate(self):
        return {"eval/loss": abs(self.parameter.item() - 3.0)}


def run(tmp_path, name, **changes):
    parameter = torch.nn.Parameter(torch.zeros(1))
    task = Pull(parameter)
    options = {"learning_rate": 1.0, "warmup_fraction": 0.0, "decay": "constant"} | changes
    tracker = Tracker("sft", tmp_path / name)
    checkpoints = Checkpoints(tmp_path / name / "checkpoints", {})
    found = train(task, list(range(8)), [parameter], schedule(**options), checkpoints, tracker, seed=0)
    return parameter.item(), found, tracker


def test_last_weights_are_kept_unless_the_best_are_asked_for(tmp_path):
    value, found, _ = run(tmp_path, "last")
    assert value == pytest.approx(10.0, abs=1e-3)
    assert found["eval/loss"] == pytest.approx(7.0, abs=1e-3)
    value, found, _ = run(tmp_path, "best", keep="best")
    assert value == pytest.approx(3.0, abs=1e-3)
    assert found["eval/loss"] == pytest.approx(0.0, abs=1e-3)


def test_patience_ends_training_after_evaluations_that_were_no_better(tmp_path):
    _, _, tracker = run(tmp_path, "patient", patience=2)
    assert [row["step"] for row in tracker.history] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("losses", "patience", "ended"),
    [
        ([3, 2, 1], 1, False),
        ([1, 2], 1, True),
        ([1, 1], 1, True),
        ([2, 3, 1], 2, False),
        ([1, 2, 3], 2, True),
        ([1, 2, 3], 3, False),
        ([1, 2, 3], 0, False),
        ([], 1, False),
    ],
)
def test_patience_by_hand(losses, patience, ended):
    assert out_of_patience([{"step": i, "eval/loss": x} for i, x in enumerate(losses)], patience) is ended


def test_best_weights_survive_a_kill(tmp_path, monkeypatch):
    real, steps = training.train_step, []

    def dying(*arguments):
        if len(steps) == 6:  # the best weights lie three steps back
            raise KeyboardInterrupt
        steps.append(1)
        return real(*arguments)

    monkeypatch.setattr(training, "train_step", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "broken", keep="best", checkpoint_seconds=0.0)
    monkeypatch.setattr(training, "train_step", real)
    value, _, tracker = run(tmp_path, "broken", keep="best", checkpoint_seconds=0.0)
    whole, _, other = run(tmp_path, "whole", keep="best", checkpoint_seconds=0.0)
    assert value == whole
    assert tracker.history == other.history
