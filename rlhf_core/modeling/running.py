"""Rows of tokens that are being written, one token at a time: what generation needs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_core.modeling import blocks, products
from rlhf_core.modeling.blocks import Heads, norm
from rlhf_core.modeling.products import PackedProduct, Product
from rlhf_core.modeling.slots import SlotRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKED_STEPS, PACKED_ROWS = 16, 64  # packing the weights pays from so many steps on, and up to so many rows
GROWTH = 32
FUSED_KEYS = 1024  # of all rows together, up to which fused attention takes less time than products


class RunningRows(Protocol):
    """Rows in numbered slots, each at its own length."""

    joins: bool  # whether rows may enter while others run

    def enter(self, slots: Sequence[int], prompts: Sequence[Sequence[int]], copies: int) -> Tensor:
        """Read each prompt once, into `copies` of the slots; logits (slots, V) after their last tokens."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to the row of every slot, tokens (slots,); logits (slots, V)."""

    def leave(self, slots: Sequence[int]) -> None:
        """These rows have ended; what their slots are stepped with no longer matters."""

    def keep(self, slots: Tensor) -> None:
        """Go on with these slots only, numbered anew. Where rows may join, one named twice becomes two."""


def open_rows(model: PreTrainedModel, slots: int, longest: int) -> RunningRows:
    """Room for `slots` rows of at most `longest` tokens."""
    if blocks.applies_to(model):
        return StaticRows(model, slots, longest)
    if model.device.type == "cuda" and blocks.knows(model):
        return SlotRows(model, slots, longest)
    return CachedRows(model)


class CachedRows:
    """Any model of transformers, with its own cache: rows enter together, padded on the left."""

    joins = False

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def enter(self, slots: Sequence[int], prompts: Sequence[Sequence[int]], copies: int) -> Tensor:
        from transformers import DynamicCache

        longest = max(map(len, prompts))
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        mask = torch.arange(longest) >= (longest - lengths)[:, None]
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        self._mask, self._cache = mask.to(self._model.device), DynamicCache(config=self._model.config)
        # Not asked of the mask, which would wait for the GPU.
        self._padded = any(len(prompt) < longest for prompt in prompts)
        positions = (self._mask.long().cumsum(dim=1) - 1).clamp(min=0)
        logits = self._forward(ids.to(self._model.device), positions)
        if copies > 1:
            self._cache.batch_repeat_interleave(copies)
            self._mask = self._mask.repeat_interleave(copies, dim=0)
            logits = logits.repeat_interleave(copies, dim=0)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        return self._forward(tokens[:, None], self._mask.sum(dim=1, keepdim=True) - 1)

    def leave(self, slots: Sequence[int]) -> None:
        return None

    def keep(self, slots: Tensor) -> None:
        self._mask = self._mask[slots]
        self._padded = not bool(self._mask.all())
        self._cache.batch_select_indices(slots)

    def _forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        hidden = self._model.base_model(
            input_ids=input_ids,
            attention_mask=self._mask if self._padded else None,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        return self._model.get_output_embeddings()(hidden[:, -1])


class StaticRows:
    """The blocks of `rlhf_core.modeling.blocks`, with keys and values in place for all slots.

    A row that ended leaves its slot to the next one that enters. Products over keys and values take half the
    time where these are contiguous, so their memory is as wide as it is used, and grows by `GROWTH` columns.
    """

    joins = True

    def __init__(self, model: PreTrainedModel, slots: int, longest: int) -> None:
        self._model, self._dtype, self._longest = model, blocks.computing_type(model), longest
        self._heads = heads = Heads.of(model)
        self._blocks = blocks.blocks_of(model, self._dtype)
        self._head: Product | PackedProduct = Product([model.get_output_embeddings()], self._dtype)
        shape = 2, slots, heads.keys, 0, heads.size  # keys, then values
        self._caches = [torch.empty(shape, dtype=self._dtype) for _ in self._blocks]
        self._lengths = torch.zeros(slots, dtype=torch.int64)
        cos, sin = blocks.rotation(model, torch.arange(longest)[None], self._dtype)
        cos, sin = cos[0, 0, :, None], sin[0, 0, :, None]  # (T, 1, d / 2)
        self._cos, self._sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)

    def enter(self, slots: Sequence[int], prompts: Sequence[Sequence[int]], copies: int) -> Tensor:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        lengths = [len(prompts[i]) for i in order]
        ids = torch.zeros(len(prompts), lengths[-1], dtype=torch.int64)
        for row, i in zip(ids, order, strict=True):
            row[: len(prompts[i])] = torch.tensor(prompts[i])
        where = torch.tensor(slots).view(-1, copies)[order]
        self._widen(lengths[-1])

        def keep(number: int, rows: slice, keys: Tensor, values: Tensor) -> None:
            both = torch.stack([keys, values]).repeat_interleave(copies, dim=1)
            self._caches[number][:, where[rows].flatten(), :, : both.shape[3]] = both

        hidden = blocks.last_hidden(self._model, ids, None, None, lengths, read_too=keep)
        self._lengths[where] = torch.tensor(lengths)[:, None]
        last = hidden[torch.arange(len(prompts)), torch.tensor(lengths) - 1]
        in_order = torch.tensor(order).argsort()
        return self._head(last)[in_order].repeat_interleave(copies, dim=0)

    def step(self, tokens: Tensor) -> Tensor:
        self._pack(len(tokens))
        heads, slots, lengths = self._heads, len(tokens), self._lengths
        self._widen(int(lengths.max()) + 1)
        cos, sin = self._cos[lengths], self._sin[lengths]
        mask, places = self._mask(), self._places()
        width = self._caches[0].shape[-2]
        attention = _fused
        if slots * width > FUSED_KEYS:
            attention, mask = _by_products, mask.expand(-1, heads.keys, -1, -1).flatten(0, 1)

        def attend(number: int, qkv: Tensor) -> Tensor:
            own = qkv.view(slots, -1, heads.size)
            turned = _turned(own[:, : heads.queries + heads.keys], cos, sin)
            own[:, heads.queries : heads.queries + heads.keys] = turned[:, heads.queries :]
            cache = self._caches[number]
            cache.view(-1, heads.size).index_copy_(0, places, own[:, heads.queries :].reshape(-1, heads.size))
            query = turned[:, : heads.queries].reshape(slots, heads.keys, -1, heads.size)
            return attention(query, cache[0], cache[1], mask, heads.scale).view(slots, -1)

        with torch.autocast("cpu", enabled=False):
            x = self._model.get_input_embeddings()(tokens)
            for number, block in enumerate(self._blocks):
                x = block(x, partial(attend, number))
            self._lengths = (lengths + 1).clamp_(max=self._longest - 1)
            return self._head(norm(x, self._model.base_model.norm, self._dtype))

    def _mask(self) -> Tensor:
        """0 for what a row holds, its next token included, and the type's least number beyond it, (slots, 1,
        1, T)."""
        width = self._caches[0].shape[-2]
        beyond = torch.arange(width) > self._lengths[:, None]
        mask = torch.zeros(beyond.shape, dtype=self._dtype)
        return mask.masked_fill_(beyond, torch.finfo(self._dtype).min)[:, None, None]

    def _places(self) -> Tensor:
        """Where the next keys, then values, of each slot stand among all of a block's, (slots 2 KV,)."""
        _, slots, keys, width, _ = self._caches[0].shape
        heads = torch.arange(2)[:, None] * slots * keys + torch.arange(keys)  # of the first slot
        each = torch.arange(slots)[:, None, None] * keys
        return ((heads + each) * width + self._lengths[:, None, None]).flatten()

    def _pack(self, rows: int) -> None:
        """Before the first step, where enough of them follow: the first token need not wait for it."""
        left = self._longest - int(self._lengths.max())
        pays = left >= PACKED_STEPS and rows <= PACKED_ROWS and products.can_pack(self._dtype)
        if isinstance(self._head, Product) and pays:
            self._blocks = [block.packed(rows) for block in self._blocks]
            self._head = PackedProduct(self._head, rows)

    def leave(self, slots: Sequence[int]) -> None:
        self._lengths[torch.tensor(slots, dtype=torch.int64)] = 0

    def keep(self, slots: Tensor) -> None:
        """Go on with these slots only, numbered anew, and no wider than the longest of them is."""
        self._lengths = self._lengths[slots]
        width = -(-int(self._lengths.max()) // GROWTH) * GROWTH
        for number, cache in enumerate(self._caches):
            self._caches[number] = cache[:, :, :, :width].index_select(1, slots)

    def _widen(self, width: int) -> None:
        """Room for so many tokens, of zeros: what the mask hides must not be NaN."""
        more = -(-width // GROWTH) * GROWTH - self._caches[0].shape[-2]
        if more > 0:
            for number, cache in enumerate(self._caches):
                self._caches[number] = F.pad(cache, (0, 0, 0, more))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`blocks.rotated` of (S, N, d) in as few operations as can be; the first half of sin has its sign."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _fused(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """(S, KV, H / KV, d), the queries of a key as rows of one head; mask (S, 1, 1, T)."""
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale).contiguous()


def _by_products(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The same by plain products; mask (S KV, 1, T)."""
    scores = torch.baddbmm(mask, query.flatten(0, 1), keys.flatten(0, 1).mT, alpha=scale)
    return (scores.softmax(dim=-1) @ values.flatten(0, 1)).view(query.shape)
