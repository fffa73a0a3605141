"""Masked reductions. A mask is True on entries that count."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of the entries under the mask; what lies outside may be anything, also NaN."""
    return values.masked_fill(~mask, 0.0).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return masked_sum(values, mask) / mask.sum()


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Population variance over the mask."""
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Shift and scale to mean 0, variance 1 over the mask; zeros elsewhere.

    Without `shift_mean` the mean stays what it was.
    """
    mean = masked_mean(values, mask)
    white = (values - mean) * torch.rsqrt(masked_var(values, mask) + eps)
    return (white if shift_mean else white + mean).masked_fill(~mask, 0.0)
