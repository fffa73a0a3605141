"""The blocks of Llama-like models on a CPU, with as little as possible between their matrix products.

The weights are those of a transformers model, and the numbers too, up to rounding. What differs: one product
for query, key and value and one for gate and up; an adapter is added inside of the product, without a tensor
of its own; keys are not repeated for the queries that share them; what the backward pass can compute again
cheaply is not kept. The products themselves are in `products`.

On a GPU transformers' own blocks and kernels do better, and models of other shapes keep them everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rlhf_core import ranks
from rlhf_core.modeling import ragged
from rlhf_core.modeling.products import PackedProduct, Product
from rlhf_core.modeling.ragged import Group

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPES = ("llama", "mistral", "qwen2")
STILL_ROTATIONS = ("default", "linear", "llama3", "yarn")  # those that do not change with the length
SHORT_SEQUENCE = 256
FEW_ROWS = 64  # up to which torch's own norm takes less time, though not for more


def computing_type(model: PreTrainedModel) -> torch.dtype:
    """What matrix products are computed in: autocast's type inside of it, else that of the weights."""
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype


def applies_to(model: PreTrainedModel) -> bool:
    """Whether the blocks of `model` are computed here."""
    return model.device.type == "cpu" and knows(model)


def knows(model: PreTrainedModel) -> bool:
    """Whether `model` is whole, not in training mode, and of a shape that is understood here."""
    config = model.config
    return (
        config.model_type in SHAPES
        and getattr(config, "hidden_act", "") == "silu"
        and getattr(config, "sliding_window", None) is None
        and (config.rope_parameters or {}).get("rope_type") in STILL_ROTATIONS
        and ranks.sharding() == "none"
        and not model.training
    )


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight (Zhang and Sennrich 2019), of rows in any type, in the type asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        normed, rstd = _normed(x, weight, eps, dtype)
        ctx.save_for_backward(x, weight, rstd)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        normed = x.float() * rstd
        wide = grad.float()
        grad_weight = (wide * normed).sum(dim=0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        wide = wide * weight
        mean = torch.linalg.vecdot(wide, normed).div_(x.shape[-1])[..., None]
        return wide.sub_(normed.mul_(mean)).mul_(rstd).to(x.dtype), grad_weight, None, None


def _normed(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = x.float()
    rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().mul_(1.0 / x.shape[-1])
    rstd.add_(eps).rsqrt_()
    return torch.mul(wide * rstd, weight, out=torch.empty(x.shape, dtype=dtype)), rstd


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of (M, 2 I), gate first (Shazeer 2020)."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _swiglu(gate_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        found = torch.empty_like(gate_up)
        to_gate, to_up = found.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=to_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=to_gate)
        return found


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _Rotate(torch.autograd.Function):
    """Turn the heads (S, T, N, d) by their position (Su et al. 2021) and put them before it: (S, N, T, d)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotated(x.transpose(1, 2), cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotated(grad, cos, -sin).transpose(1, 2), None, None


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (S, N, T, d) with its halves turned into each other; cos and sin (S or 1, 1, T, d / 2)."""
    left, right = x.chunk(2, dim=-1)
    turned = torch.empty(x.shape, dtype=x.dtype)
    to_left, to_right = turned.chunk(2, dim=-1)
    torch.mul(left, cos, out=to_left).addcmul_(right, sin, value=-1)
    torch.mul(right, cos, out=to_right).addcmul_(left, sin)
    return turned


PRODUCTS = ("qkv", "out", "gate_up", "down")


@dataclass(frozen=True)
class Block:
    """One block's products and norms."""

    qkv: Product | PackedProduct
    out: Product | PackedProduct
    gate_up: Product | PackedProduct
    down: Product | PackedProduct
    norms: tuple[nn.Module, nn.Module]  # before attention, before the perceptron

    @classmethod
    def of(cls, layer: Any, dtype: torch.dtype) -> Block:
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            Product([attention.q_proj, attention.k_proj, attention.v_proj], dtype),
            Product([attention.o_proj], dtype),
            Product([mlp.gate_proj, mlp.up_proj], dtype),
            Product([mlp.down_proj], dtype),
            (layer.input_layernorm, layer.post_attention_layernorm),
        )

    def packed(self, rows: int) -> Block:
        """The same for `rows` rows at a time, without gradient."""
        products = {name: PackedProduct(getattr(self, name), rows) for name in PRODUCTS}
        return replace(self, **products)  # type: ignore[arg-type]

    def __call__(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """(M, D) -> (M, D); `attend` makes of (M, (H + 2 KV) d) what the heads read, (M, H d)."""
        dtype = self.qkv.dtype
        x = x + self.out(attend(self.qkv(norm(x, self.norms[0], dtype))))
        return x + self.down(swiglu(self.gate_up(norm(x, self.norms[1], dtype))))


def norm(x: Tensor, module: Any, dtype: torch.dtype) -> Tensor:
    weight, eps = module.weight, module.variance_epsilon
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps, dtype)
    if len(x) <= FEW_ROWS and x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps).to(dtype)
    return _normed(x, weight, eps, dtype)[0]


def swiglu(gate_up: Tensor) -> Tensor:
    return _SwiGLU.apply(gate_up) if torch.is_grad_enabled() else _swiglu(gate_up)


@dataclass(frozen=True)
class Heads:
    """How many heads ask and how many answer, and how wide they are."""

    queries: int
    keys: int
    size: int
    scale: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> Heads:
        attention, config = model.base_model.layers[0].self_attn, model.config
        return cls(
            config.num_attention_heads, config.num_key_value_heads, attention.head_dim, attention.scaling
        )

    def split(self, qkv: Tensor) -> Sequence[Tensor]:
        """(S, T, (H + 2 KV) d) -> (S, T, H, d), (S, T, KV, d), (S, T, KV, d)."""
        heads = qkv.unflatten(-1, (-1, self.size))
        return heads.split([self.queries, self.keys, self.keys], dim=-2)


def rotation(model: PreTrainedModel, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (S or 1, 1, T, d / 2) of the positions (S or 1, T)."""
    like = torch.empty(0, dtype=dtype, device=positions.device)
    cos, sin = model.base_model.rotary_emb(like, position_ids=positions)
    half = cos.shape[-1] // 2
    return cos[:, None, :, :half].contiguous(), sin[:, None, :, :half].contiguous()


def last_hidden(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor | None,
    visible: Tensor | None,
    lengths: Sequence[int] | None = None,
    *,
    recompute: bool = False,
    read_too: Callable[[int, slice, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Last hidden states (S, T, D) of rows padded on the right, as `trunk.last_hidden` gives them.

    Padding that `lengths` (S,) tells of is left out of all products. `read_too` is given the number of each
    block, some of the rows, and the keys and values of their heads, (rows, KV, T or fewer, d) each.
    """
    dtype = computing_type(model)
    with torch.autocast(model.device.type, enabled=False):
        heads = Heads.of(model)
        rows, length = input_ids.shape
        positions = torch.arange(length)[None] if position_ids is None else position_ids
        lengths = [length] * rows if lengths is None else lengths
        turns = rotation(model, positions, dtype)
        settings = [
            (group, *_turns_of(group, turns), _mask_of(group, visible, heads, dtype))
            for group in ragged.groups(lengths)
        ]

        def attend(number: int, qkv: Tensor) -> Tensor:
            read = []
            parts = qkv.split([group.tokens for group, *_ in settings])
            for part, (group, cos, sin, mask) in zip(parts, settings, strict=True):
                query, key, value = heads.split(group.padded(part))
                query, key = _Rotate.apply(query, cos, sin), _Rotate.apply(key, cos, sin)
                value = value.transpose(1, 2)
                if read_too is not None:
                    read_too(number, group.rows, key, value)
                attention = _attend_short if group.length <= SHORT_SEQUENCE else _attend_long
                read.append(group.real(attention(query, key, value, mask, heads).transpose(1, 2).flatten(2)))
            return torch.cat(read) if len(read) > 1 else read[0]

        where = ragged.places(lengths, length)
        # Of whole rows, since noise on embeddings (NEFTune) depends on their length.
        x = ragged.gather(model.get_input_embeddings()(input_ids).flatten(0, 1), where)
        for number, block in enumerate(blocks_of(model, dtype)):
            if recompute and torch.is_grad_enabled():
                own = partial(attend, number)
                x = checkpoint(block, x, own, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, partial(attend, number))
        x = norm(x, model.base_model.norm, dtype)
        return ragged.spread(x, where, rows * length).view(rows, length, -1)


def blocks_of(model: PreTrainedModel, dtype: torch.dtype) -> list[Block]:
    return [Block.of(layer, dtype) for layer in model.base_model.layers]


def _turns_of(group: Group, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    rows = group.rows if len(turns[0]) > 1 else slice(None)
    cos, sin = turns
    return cos[rows, :, : group.length], sin[rows, :, : group.length]


def _mask_of(group: Group, visible: Tensor | None, heads: Heads, dtype: torch.dtype) -> Tensor | None:
    """To be added to the scores of short rows; else which tokens are seen, where it is not all before."""
    seen = None if visible is None else visible[group.rows, : group.length, : group.length]
    return _added_mask(heads, group.length, seen, dtype) if group.length <= SHORT_SEQUENCE else seen


def _attend_short(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, heads: Heads) -> Tensor:
    """(S, H, T, d): plain products, all queries of a key in one. For short rows faster than fused attention,
    forward and backward; for long ones the scores would fill the memory."""
    rows, _, length, size = query.shape
    shape = rows * heads.keys, -1, size
    scores = torch.baddbmm(mask, query.view(shape), key.view(shape).mT, alpha=heads.scale)
    return (scores.softmax(dim=-1) @ value.reshape(shape)).view(rows, heads.queries, length, size)


def _attend_long(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, heads: Heads) -> Tensor:
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if visible is None else visible[:, None],
        is_causal=visible is None,
        scale=heads.scale,
        enable_gqa=True,
    )


def _added_mask(heads: Heads, length: int, visible: Tensor | None, dtype: torch.dtype) -> Tensor:
    """0 where a token may look and the type's least number elsewhere, (1 or S KV, H / KV * T, T)."""
    group = heads.queries // heads.keys
    seen = torch.ones(1, length, length, dtype=torch.bool).tril() if visible is None else visible
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    mask = mask[:, None, None].expand(-1, 1 if visible is None else heads.keys, group, -1, -1)
    return mask.reshape(-1, group * length, length)
