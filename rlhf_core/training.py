"""The loop that pre-training, SFT and reward-model training share: seeded order, exact resume, one
denominator a step.

What differs between them is a `Task`: how a batch of rows becomes a summed loss, and how to evaluate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlhf_core import ranks
from rlhf_core.checkpoint import (
    Checkpoints,
    load_optimizer_tensors,
    load_parameter_tensors,
    optimizer_tensors,
    parameter_tensors,
)
from rlhf_core.modeling import sharding
from rlhf_core.optim import Optimizer, SkipGuard, held_moments, make_optimizer, step_if_finite
from rlhf_core.tracking import Tracker


class Task(Protocol):
    """A supervised objective over rows, to inherit from."""

    def start_step(self, step: int) -> None:
        """Called before each optimizer step: where randomness starts that a resume has to repeat."""
        return None

    def length(self, row: Any) -> int:
        """Tokens of a row; rows of similar length share a micro-batch."""

    def weight(self, rows: Sequence[Any]) -> float:
        """What a step's summed loss is divided by: target tokens, or pairs."""

    def flops(self, rows: Sequence[Any]) -> float:
        """Operations of the loss on `rows` and of its gradient; 0 where nobody counts them."""
        return 0.0

    def loss(self, rows: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss of a micro-batch, and summed metrics (without gradient)."""

    def evaluate(self) -> dict[str, float]:
        """Metrics on held-out rows."""

    def describe(self, row: Any) -> dict[str, Any]:
        """A row as a person can read it."""


@dataclass(frozen=True)
class Schedule:
    """Optimizer steps, batch sizes, the learning rate's path, and when to evaluate and stop."""

    num_steps: int
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    warmup_fraction: float
    max_grad_norm: float
    eval_every: int
    decay: str = "cosine"  # after the linear warm-up: cosine or linear to 0, or constant
    keep: str = "last"  # or best, by eval/loss
    checkpoint_seconds: float = 60.0  # between two checkpoints
    patience: int = 0  # evaluations without a lower eval/loss that end training; 0 never does

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        warmup = round(self.warmup_fraction * self.num_steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.num_steps - warmup)
        if self.decay == "constant":
            return self.learning_rate
        if self.decay == "linear":
            return self.learning_rate * (1.0 - progress)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def step_rows(num_rows: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Rows of a step: a fresh permutation each epoch, from the seed and the epoch alone.

    The last batch of an epoch may be smaller; no row is left out or seen twice in an epoch.
    """
    per_epoch = math.ceil(num_rows / batch_size)
    epoch, position = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(num_rows, generator=generator).tolist()
    return order[position * batch_size : (position + 1) * batch_size]


def train(
    task: Task,
    rows: Sequence[Any],
    parameters: list[nn.Parameter],
    schedule: Schedule,
    checkpoints: Checkpoints,
    tracker: Tracker,
    *,
    seed: int,
) -> dict[str, float]:
    """Train `parameters` on `rows`; return the evaluation of the weights it ends with.

    Goes on from the newest checkpoint of the same run.
    """
    optimizer = make_optimizer(parameters, schedule.learning_rate)
    best = Best(parameters) if schedule.keep == "best" else None
    first = _resume(optimizer, parameters, best, checkpoints, tracker)
    tracker.progress(first, schedule.num_steps)
    last_saved = started = time.monotonic()
    tokens, flops, training_seconds = 0, 0.0, 0.0
    evaluation: dict[str, float] = {}
    guard = SkipGuard()
    for step in range(first, schedule.num_steps):
        batch = [rows[i] for i in step_rows(len(rows), schedule.batch_size, step, seed)]
        step_started = time.monotonic()
        metrics = train_step(task, batch, optimizer, schedule, step)
        training_seconds += time.monotonic() - step_started
        flops += task.flops(batch)
        if metrics["train/skipped_steps"]:
            tracker.table("skipped_batch", [task.describe(row) for row in batch])
        guard.note(metrics["train/skipped_steps"], f"{tracker.stage}, step {step + 1}")
        if (step + 1) % schedule.eval_every == 0 or step + 1 == schedule.num_steps:
            evaluation = task.evaluate()
            metrics |= evaluation
            if best is not None:
                best.note(evaluation)
        tracker.log(metrics, step + 1)
        tokens += sum(map(task.length, batch))
        tracker.progress(step + 1, schedule.num_steps, f"loss {metrics['train/loss']:.3f}")
        due = ranks.agree(time.monotonic() - last_saved >= schedule.checkpoint_seconds)
        if due and step + 1 < schedule.num_steps:
            _save(step + 1, optimizer, parameters, best, checkpoints, tracker)
            last_saved = time.monotonic()
        if evaluation and out_of_patience(tracker.history, schedule.patience):
            break
    tracker.log_perf(
        {
            "perf/tokens_per_second": tokens / max(1e-9, time.monotonic() - started),
            "perf/gflops_per_second": flops / 1e9 / max(1e-9, training_seconds),
            "perf/held_moments": held_moments(optimizer),
        }
    )
    return evaluation if best is None else best.restore()


class Best:
    """The weights with the lowest eval/loss so far."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self.tensors: dict[str, Tensor] = {}
        self.evaluation: dict[str, float] = {}

    def note(self, evaluation: Mapping[str, float]) -> None:
        if not self.evaluation or evaluation["eval/loss"] < self.evaluation["eval/loss"]:
            self.evaluation = dict(evaluation)
            named = parameter_tensors(self._parameters, "best")
            self.tensors = {name: tensor.detach().clone() for name, tensor in named.items()}

    def restore(self) -> dict[str, float]:
        """Put the best weights back; their evaluation."""
        load_parameter_tensors(self._parameters, "best", self.tensors)
        return self.evaluation


def out_of_patience(history: Sequence[Mapping[str, float]], patience: int) -> bool:
    """Whether the last `patience` evaluations were all no better than the best before them."""
    losses = [row["eval/loss"] for row in history if "eval/loss" in row]
    return 0 < patience < len(losses) and min(losses[-patience:]) >= min(losses[:-patience])


def train_step(
    task: Task,
    batch: Sequence[Any],
    optimizer: Optimizer,
    schedule: Schedule,
    step: int,
) -> dict[str, float]:
    """One optimizer step over `batch`, a micro-batch at a time, divided once by the weight of the whole
    batch."""
    task.start_step(step)
    weight = task.weight(batch)
    sums: list[dict[str, Tensor]] = []
    parts = in_micro_batches(batch, schedule.micro_batch_size, task.length)
    for rows, counts in ranks.share_passes(parts):
        loss, stats = task.loss(rows)
        (counts * loss / weight).backward()
        if counts:
            sums.append(stats | {"train/loss": loss.detach()})
    learning_rate = schedule.learning_rate_at(step)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    grad_norm, taken = step_if_finite(optimizer, schedule.max_grad_norm)
    metrics = {name: value / weight for name, value in ranks.total(sums).items()}
    return metrics | {
        "train/grad_norm": grad_norm,
        "train/learning_rate": learning_rate,
        "train/skipped_steps": float(not taken),
    }


def _save(
    step: int,
    optimizer: Optimizer,
    parameters: Sequence[nn.Parameter],
    best: Best | None,
    to: Checkpoints,
    tracker: Tracker,
) -> None:
    tensors = parameter_tensors(parameters, "parameter") | optimizer_tensors(optimizer, "optimizer")
    state: dict[str, Any] = {"step": step, "history": tracker.history}
    if best is not None:
        tensors |= best.tensors
        state["best"] = best.evaluation
    to.save(step, tensors, state)


def _resume(
    optimizer: Optimizer,
    parameters: Sequence[nn.Parameter],
    best: Best | None,
    checkpoints: Checkpoints,
    tracker: Tracker,
) -> int:
    checkpoint = checkpoints.load_latest()
    if checkpoint is None:
        return 0
    load_parameter_tensors(parameters, "parameter", checkpoint.tensors)
    load_optimizer_tensors(optimizer, "optimizer", checkpoint.tensors)
    if best is not None:
        best.evaluation = checkpoint.state["best"]
        kept = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("best.")}
        likes = parameter_tensors(parameters, "best")
        best.tensors = {name: sharding.placed_like(tensor, likes[name]) for name, tensor in kept.items()}
    restore_history(tracker, checkpoint.state["history"])
    return int(checkpoint.state["step"])


def restore_history(tracker: Tracker, history: Sequence[Mapping[str, float]]) -> None:
    for row in history:
        tracker.log({name: value for name, value in row.items() if name != "step"}, int(row["step"]))


def in_micro_batches(rows: Sequence[Any], size: int, length: Callable[[Any], int]) -> list[list[Any]]:
    """Rows cut into micro-batches of similar length."""
    ordered = sorted(rows, key=length)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]
