"""Optimizer steps that a non-finite gradient cannot spoil."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from rlhf_core.errors import RLHFError

MOST_SKIPPED = 5


class DivergedError(RLHFError):
    """Training met non-finite gradients again and again; it would again, so it is not worth a retry."""

    exit_code = 4


def step_if_finite(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], max_grad_norm: float
) -> tuple[float, bool]:
    """Clip the gradients, take the step and clear them; the norm before clipping, and if a step was taken.

    With a norm that is infinite or not a number nothing changes: neither weights nor moments.
    """
    norm = float(nn.utils.clip_grad_norm_(parameters, max_grad_norm))
    finite = math.isfinite(norm)
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


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
