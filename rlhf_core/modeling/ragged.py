"""Rows of different lengths without their padding: where tokens meet, in attention, rows of about one length
go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STRETCH, SLACK = 1.25, 8  # how far lengths in a group may spread; more groups take time too


def places(lengths: Sequence[int], width: int) -> Tensor | None:
    """Where in (S, width), flattened, the tokens of rows stand that are no padding; None for everywhere."""
    if all(length == width for length in lengths):
        return None
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).flatten().nonzero()[:, 0]


def spread(x: Tensor, where: Tensor | None, size: int) -> Tensor:
    """x (M, W) to the places `where` (M,) of (size, W), 0 elsewhere."""
    return x if where is None else _Spread.apply(x, where, size)


def gather(x: Tensor, where: Tensor | None) -> Tensor:
    """The rows of x (size, W) at the places `where` (M,), none of them twice."""
    return x if where is None else _Gather.apply(x, where)


@dataclass(frozen=True)
class Group:
    """Neighbouring rows of about one length, padded to the longest of them only."""

    rows: slice
    length: int
    tokens: int  # that are no padding
    where: Tensor | None  # their places in (rows, length)

    def padded(self, x: Tensor) -> Tensor:
        """(tokens, W) -> (rows, length, W)."""
        rows = self.rows.stop - self.rows.start
        return spread(x, self.where, rows * self.length).view(rows, self.length, -1)

    def real(self, x: Tensor) -> Tensor:
        """(rows, length, W) -> (tokens, W)."""
        return gather(x.flatten(0, 1), self.where)


def groups(lengths: Sequence[int]) -> list[Group]:
    """Groups of rows in their order; few where rows of similar length are neighbours."""
    found = []
    for rows in _runs(lengths):
        own = lengths[rows]
        found.append(Group(rows, max(own), sum(own), places(own, max(own))))
    return found


def _runs(lengths: Sequence[int]) -> list[slice]:
    runs, start = [], 0
    for end in range(1, len(lengths) + 1):
        together = lengths[start : end + 1]
        if end == len(lengths) or max(together) > STRETCH * min(together) + SLACK:
            runs.append(slice(start, end))
            start = end
    return runs


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, where: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(where)
        return x.new_zeros(size, x.shape[-1]).index_copy_(0, where, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, where: Tensor) -> Tensor:
        ctx.save_for_backward(where)
        ctx.size = len(x)
        return x.index_select(0, where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(ctx.size, grad.shape[-1]).index_copy_(0, ctx.saved_tensors[0], grad), None
