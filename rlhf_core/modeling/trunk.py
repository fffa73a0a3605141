"""One forward pass through a model's trunk, without its head."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_core.modeling import blocks
from rlhf_core.modeling.blocks import SHORT_SEQUENCE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def last_hidden(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    visible: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    *,
    recompute_in: Callable[[], AbstractContextManager[object]] | None = None,
) -> Tensor:
    """Last hidden states (S, T, D) of rows padded on the right; the inputs are those of `TokenBatch`.

    Llama-like models on a CPU are computed by `blocks`, without the padding where `lengths` tells it; there
    the states are 0. Other models there attend to short rows by plain
    matrix products: forward and backward of the whole take some 15 % less time than with the fused kernel.
    Long ones would need T x T scores in memory.

    With `recompute_in` only the inputs of each block are kept for the backward pass, which computes the rest
    again (Chen et al. 2016) inside that context: the one that makes the model what it is now.
    """
    if blocks.applies_to(model):
        return blocks.last_hidden(
            model, input_ids, position_ids, visible, lengths, recompute=recompute_in is not None
        )
    eager = input_ids.device.type == "cpu" and input_ids.shape[1] <= SHORT_SEQUENCE
    mask = None if visible is None else visible[:, None]
    if mask is not None and eager:
        added = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device)
        mask = added.masked_fill_(~mask, torch.finfo(model.dtype).min)

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        assert recompute_in is not None
        with recompute_in(), _attention(model, eager):
            yield

    recomputing = recompute_in is not None and torch.is_grad_enabled()
    with _attention(model, eager), _recomputed_blocks(model, again) if recomputing else nullcontext():
        return model.base_model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False
        ).last_hidden_state


@contextlib.contextmanager
def _attention(model: PreTrainedModel, eager: bool) -> Iterator[None]:
    config = model.config
    before = config._attn_implementation
    if eager:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


@contextlib.contextmanager
def _recomputed_blocks(
    model: PreTrainedModel, again: Callable[[], AbstractContextManager[None]]
) -> Iterator[None]:
    """Turn on transformers' own switch, block by block: a model in train mode would turn on dropout too."""
    blocks = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    blocks = [block for block in blocks if block is not model.base_model]
    run_again = partial(
        checkpoint,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), again()),
    )
    for block in blocks:
        block.gradient_checkpointing, block.training = True, True
        block._gradient_checkpointing_func = run_again
    try:
        yield
    finally:
        for block in blocks:
            block.gradient_checkpointing, block.training = False, False
