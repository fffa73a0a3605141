"""Linear layers of one input as one matrix product: with adapters, trained, or packed for generation.

The weights stay those of the layers: moved to stand together in memory, or, in float32 where products are
computed in bfloat16, copied once for each change instead of each pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from rlhf_core.modeling.lora import LoRALinear

# Stacked copies of weights by the first of them: where the weights stood and how often they had been written.
_copies: WeakIdKeyDictionary = WeakIdKeyDictionary()


def stacked(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The weights (or biases) one below the other in `dtype`.

    Those of that type are moved to stand so in memory, once. Of others a copy is kept as long as they are
    not written to; a write that goes round autograd's count of versions, as by `.data`, goes unseen.
    """
    first = weights[0]
    if len(weights) == 1 and first.dtype == dtype:
        return first.detach()
    if all(weight.dtype == dtype for weight in weights):
        return _moved(weights)
    seen = [(weight.data_ptr(), weight._version) for weight in weights]
    kept = _copies.get(first)
    if kept is None or kept[0] != seen or kept[1].dtype != dtype:
        with torch.inference_mode(False), torch.no_grad():
            kept = _copies[first] = seen, torch.cat([weight.detach().to(dtype) for weight in weights])
    return kept[1]


def _moved(weights: Sequence[Tensor]) -> Tensor:
    first = weights[0].detach()
    storage, end = first.untyped_storage().data_ptr(), first.storage_offset()
    for weight in weights:
        if weight.untyped_storage().data_ptr() != storage or weight.storage_offset() != end:
            break
        end += weight.numel()
    else:
        rows = sum(map(len, weights))
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, whole.split([len(w) for w in weights]), strict=True):
            weight.data = part
    return whole


@dataclass(frozen=True)
class Product:
    """Linear layers of one input, as one: y = x W' + b + (x A') B', adapters where one is active."""

    layers: Sequence[nn.Linear | LoRALinear]
    dtype: torch.dtype

    @cached_property
    def plain(self) -> list[nn.Linear]:
        return [layer.base if isinstance(layer, LoRALinear) else layer for layer in self.layers]

    @cached_property
    def adapters(self) -> list[Tensor]:
        """A of each layer, then B of each; empty without an active adapter."""
        adapted = [layer for layer in self.layers if isinstance(layer, LoRALinear)]
        if not adapted or adapted[0].active.name is None:
            return []
        name = adapted[0].active.name
        return [layer.lora_A[name] for layer in adapted] + [layer.lora_B[name] for layer in adapted]

    @cached_property
    def weight(self) -> Tensor:
        return stacked([layer.weight for layer in self.plain], self.dtype)

    @cached_property
    def bias(self) -> Tensor | None:
        biases = [layer.bias for layer in self.plain if layer.bias is not None]
        return stacked(biases, self.dtype) if biases else None

    @cached_property
    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """A (n rank, in) and, by blocks, scale * B (out, n rank) in the computing type, without gradient."""
        if not self.adapters:
            return None
        return _low_rank(self.adapters, self.layers[0].scale, self.dtype)  # type: ignore[union-attr,arg-type]

    def __call__(self, x: Tensor) -> Tensor:
        """(M, in) -> (M, out)."""
        if not torch.is_grad_enabled():
            return _product(x, self.weight, self.bias, self.low_rank)
        if self.adapters:
            return _Adapted.apply(x, self.weight, self.bias, self.layers[0].scale, *self.adapters)
        trained = [layer.weight for layer in self.plain] + [
            layer.bias for layer in self.plain if layer.bias is not None
        ]
        if any(parameter.requires_grad for parameter in trained):
            return _Trained.apply(x, self.weight, self.bias, len(self.plain), *trained)
        return F.linear(x, self.weight, self.bias)


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, low_rank: tuple[Tensor, Tensor] | None
) -> Tensor:
    y = F.linear(x, weight, bias)
    if low_rank is not None:
        a, b = low_rank
        y.addmm_(F.linear(x, a), b.t())
    return y


class PackedProduct:
    """A product without gradient for few rows at a time, its weight copied into the order that oneDNN reads.

    Half the time of a plain one for up to some 32 rows, which is mostly spent reading the weight. An adapter
    is part of the same product, W x + B (A x) = [W B] [x, A x]: a product of its own would read and write
    all of what comes out once more.
    """

    def __init__(self, product: Product, rows: int) -> None:
        self.dtype = product.dtype
        weight, self._a = product.weight, None
        if product.low_rank is not None:
            a, b = product.low_rank
            weight, self._a = torch.cat([weight, b], dim=1), _packed(a, rows)
        self._weight, self._bias = _packed(weight, rows), product.bias

    def __call__(self, x: Tensor) -> Tensor:
        """(M, in) -> (M, out)."""
        if self._a is not None:
            x = torch.cat([x, _packed_product(x, self._a, None)], dim=1)
        return _packed_product(x, self._weight, self._bias)


def _packed(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def _packed_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch has the products of `PackedProduct` for the type."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, n) for n in names):
        return False
    return dtype == torch.float32 or bool(
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _low_rank(adapters: Sequence[Tensor], scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    count = len(adapters) // 2
    a = torch.cat([part.detach() for part in adapters[:count]]).to(dtype)
    b = torch.block_diag(*(scale * part.detach() for part in adapters[count:])).to(dtype)
    return a, b


class _Adapted(torch.autograd.Function):
    """A product with frozen weights; the gradient goes to the input and to the adapters."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, *adapters: Tensor
    ) -> Tensor:
        a, b = _low_rank(adapters, scale, weight.dtype)
        low = F.linear(x, a)
        y = F.linear(x, weight, bias)
        y.addmm_(low, b.t())
        ctx.save_for_backward(x, low, weight, a, b)
        ctx.scale = scale
        ctx.ranks = [len(part) for part in adapters[: len(adapters) // 2]]
        ctx.rows = [len(part) for part in adapters[len(adapters) // 2 :]]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, a, b = ctx.saved_tensors
        grad_low = grad @ b
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            grad_x.addmm_(grad_low, a)
        grads_a = (grad_low.t() @ x).float().split(ctx.ranks)
        parts = zip(grad.split(ctx.rows, dim=1), low.split(ctx.ranks, dim=1), strict=True)
        grads_b = [(part.t() @ own).float() * ctx.scale for part, own in parts]
        return grad_x, None, None, None, *grads_a, *grads_b


class _Trained(torch.autograd.Function):
    """A product with weights that learn; `weight` and `bias` hold them, stacked, in the computing type."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, count: int, *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.count, ctx.rows = count, [len(part) for part in parameters]
        ctx.dtype = parameters[0].dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grads = [part.to(ctx.dtype) for part in (grad.t() @ x).split(ctx.rows[: ctx.count])]
        if len(ctx.rows) > ctx.count:
            grads += [part.to(ctx.dtype) for part in grad.sum(dim=0).split(ctx.rows[ctx.count :])]
        return grad_x, None, None, None, *grads
