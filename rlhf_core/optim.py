"""Optimizer steps that a non-finite gradient cannot spoil."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import nn

from rlhf_core import ranks
from rlhf_core.errors import RLHFError
from rlhf_core.modeling import sharding
from rlhf_core.modeling.zero import ZeroAdamW

MOST_SKIPPED = 5

Optimizer: TypeAlias = torch.optim.Optimizer | ZeroAdamW


class DivergedError(RLHFError):
    """Training met non-finite gradients again and again; it would again, so it is not worth a retry."""

    exit_code = 4


def make_optimizer(
    parameters: Sequence[nn.Parameter], learning_rate: float, *, eps: float = 1e-8
) -> Optimizer:
    """AdamW without weight decay, split over the ranks as `run.sharding` says."""
    if ranks.sharding() == "moments":
        return ZeroAdamW(parameters, learning_rate, eps=eps)
    # Sharded parameters and whole ones cannot be in one fused step.
    foreach = False if ranks.shard_weights() else None
    fused = True if foreach is None and parameters[0].device.type in ("cpu", "cuda") else None
    return torch.optim.AdamW(
        parameters, lr=learning_rate, eps=eps, weight_decay=0.0, foreach=foreach, fused=fused
    )


def step_if_finite(optimizer: Optimizer, max_grad_norm: float) -> tuple[float, bool]:
    """Sum the gradients over ranks, clip them, take the step, clear them.

    Returns the norm before clipping, and if a step was taken.

    With a norm that is infinite or not a number nothing changes: neither weights nor moments.
    """
    if isinstance(optimizer, ZeroAdamW):
        return optimizer.step_if_finite(max_grad_norm)
    parameters = parameters_of(optimizer)
    ranks.sum_gradients(parameters)
    norm = _clip(parameters, max_grad_norm)
    finite = math.isfinite(norm)
    if finite:
        optimizer.step()
        # The fused kernel does not count its writes, by which copies of the weights know that they are old.
        torch.autograd.graph.increment_version(parameters)
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def held_moments(optimizer: Optimizer) -> float:
    """Share of the optimizer's moments that this rank keeps."""
    parameters = parameters_of(optimizer)
    whole = sum(parameter.numel() for parameter in parameters)
    if isinstance(optimizer, ZeroAdamW):
        return optimizer.held() / whole
    return sum(sharding.part_here(parameter).numel() for parameter in parameters) / whole


def _clip(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients down to a common norm of at most `max_norm`; the norm before, over all ranks."""
    graded = [p for p in parameters if p.grad is not None]
    sharded = [p for p in graded if ranks.is_sharded(p)]
    if not sharded:
        return float(nn.utils.clip_grad_norm_(graded, max_norm))
    groups = sharded, [p for p in graded if not ranks.is_sharded(p)]
    norms = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    norm = torch.stack([sharding.whole(part) for part in norms]).norm()
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return float(norm)


class SkipGuard:
    """Ends a training whose last `MOST_SKIPPED` steps were all skipped: it would only burn time."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def note(self, skipped: float, where: str) -> None:
        """Raises DivergedError that names `where` and what to try."""
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if self._in_a_row >= MOST_SKIPPED:
            raise DivergedError(
                f"{where}: {self._in_a_row} steps in a row had a loss or gradient that is not finite; lower "
                "the learning rate, or set run.precision to float32; skipped_batch.table.json in "
                ".rlhf/runs/STAGE holds what the last one saw"
            )
