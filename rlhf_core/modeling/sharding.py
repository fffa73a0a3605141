"""Weights split over the ranks of a training (FSDP2): each keeps its part of every block, of the gradients
and of the optimizer's moments, and has a block whole only while it computes with it.

Embeddings, head and last norm, used outside of a model's forward pass too, stay whole on every rank.
Passes without gradient (rollouts, evaluation) differ in number between ranks, so they run inside `gathered`,
where the blocks are whole and no rank waits for another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_core import ranks

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from transformers import PreTrainedModel


def shard_blocks(model: PreTrainedModel) -> None:
    """Split the blocks of `model` over the ranks, in place. With sharding off nothing happens.

    All adapters must be there already. Gradients come out as sums over ranks, as `ranks.sum_gradients` makes
    them of the parameters that stay whole.
    """
    if not ranks.shard_weights():
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ranks.join(model.device)
    mesh = init_device_mesh(model.device.type, (ranks.count(),))
    names = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    for block in blocks:
        sharded = fully_shard(block, mesh=mesh, reshard_after_forward=True)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other


@contextlib.contextmanager
def gathered(models: Iterable[PreTrainedModel]) -> Iterator[None]:
    """Hold all blocks whole, for passes without gradient. All ranks enter and leave together."""
    blocks = [block for model in models for block in _sharded_blocks(model)]
    for block in blocks:
        block.unshard()
        block.set_reshard_after_forward(False)
    try:
        yield
    finally:
        for block in blocks:
            block.set_reshard_after_forward(True)
            block.reshard()


def _sharded_blocks(model: PreTrainedModel) -> list[FSDPModule]:
    if ranks.count() == 1:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def unsharded(model: PreTrainedModel, build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A plain copy of a sharded model on the CPU, filled into what `build` makes; else the model itself.

    All ranks take part; only the first gets the copy.
    """
    if not _sharded_blocks(model):
        return model
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        full = whole(parameter.detach())
        if ranks.is_first():
            state[name] = full.cpu()
    if not ranks.is_first():
        return model
    plain = build()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(state[name])
    return plain


def part_here(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor. Any other comes back as it is."""
    return tensor.to_local() if ranks.is_sharded(tensor) else tensor  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank; all take part. Any other comes back as it is."""
    return tensor.full_tensor() if ranks.is_sharded(tensor) else tensor  # type: ignore[operator]


def placed_like(full: Tensor, like: Tensor) -> Tensor:
    """`full` on the device of `like`, and split as it is."""
    full = full.to(like.device)
    if not ranks.is_sharded(like) or ranks.is_sharded(full):
        return full
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    # Every rank has read the whole tensor: each takes its own part, and nothing is sent.
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
