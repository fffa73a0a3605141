"""One training in several processes: the ranks share the forward and backward passes of each step.

Everything else (order of the data, random numbers, optimizer steps) every rank computes for itself from the
same seeds and the same summed gradients. So a run of many processes takes the steps of a run of one on the
same global batch, and only the first rank writes. With one process nothing here does anything.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from rlhf_core.errors import InputError, LostRankError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Item = TypeVar("Item")

# How `accelerate launch` tells its processes what to split between them, and run.sharding too.
LAUNCHED = {
    "none": {},
    "moments": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    "weights": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
}
# What else a launcher may ask for: its key, the variable, what silence means, and what is done here.
WISHES = {
    "moments": (
        ("zero_stage", "ACCELERATE_DEEPSPEED_ZERO_STAGE", None, "1"),
        ("offload_optimizer_device", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none", "none"),
        ("offload_param_device", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none", "none"),
        ("deepspeed_config_file", "ACCELERATE_DEEPSPEED_CONFIG_FILE", "none", "none"),
    ),
    "weights": (("fsdp_version", "FSDP_VERSION", "1", "2"),),
}


def rank() -> int:
    """0 in a run of one process."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def sharding() -> str:
    """What the ranks of this training split between them: "none", "moments" (modeling/zero.py) or "weights"
    (modeling/sharding.py).

    Raises InputError for what a launcher may ask for and this does not do.
    """
    asked = [name for name, wish in LAUNCHED.items() if wish and os.environ.get(next(iter(wish))) == "true"]
    if count() == 1 or not asked:
        return "none"
    for key, variable, unsaid, done in WISHES[asked[0]]:
        if (told := os.environ.get(variable, unsaid)) != done:
            raise InputError(
                f"accelerate launch: {key} is {told}, must be {done}; configs/accelerate has files that work"
            )
    return asked[0]


def shard_weights() -> bool:
    return sharding() == "weights"


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only a part of the tensor."""
    return count() > 1 and hasattr(tensor, "full_tensor")


def join(device: torch.device) -> None:
    """Meet the other ranks: gloo between CPUs, NCCL between GPUs. Later calls return at once."""
    if count() > 1:
        sharding()  # what cannot be done is told before a model loads
        from accelerate import PartialState

        # The first rank may work on for long while the others wait, and a lost one is noticed otherwise.
        PartialState(cpu=device.type == "cpu", timeout=timedelta(days=1))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Turn a lost connection to another rank into LostRankError; leave the group when all are done."""
    try:
        yield
        if count() > 1:
            from torch import distributed

            distributed.barrier()
            distributed.destroy_process_group()
    except RuntimeError as error:
        if count() > 1 and any(word in str(error) for word in ("gloo", "NCCL", "Connection")):
            raise LostRankError("another process of this training is gone") from error
        raise


def agree(answer: bool) -> bool:
    """The first rank's answer, on every rank: for what a clock decides."""
    if count() == 1:
        return answer
    from accelerate.utils import broadcast_object_list

    return bool(broadcast_object_list([answer])[0])


def share(items: Sequence[Item]) -> list[Item]:
    """Every `count()`-th item, from this rank's own on."""
    return list(items[rank() :: count()])


def share_passes(items: Sequence[Item]) -> list[tuple[Item, float]]:
    """`share` for passes with gradients: each item with its weight, 1.

    Where weights are sharded a pass needs all ranks, so each must make as many: one with fewer items takes
    another's once more, with the weight 0.
    """
    own = [(item, 1.0) for item in share(items)]
    missing = -(-len(items) // count()) - len(own)
    return own + [(items[-1], 0.0)] * missing if shard_weights() else own


def gather(items: Sequence[Item]) -> list[Item]:
    """The items that `share` dealt out, from all ranks, in their first order."""
    if count() == 1:
        return list(items)
    from accelerate.utils import gather_object

    numbered = [(rank() + i * count(), item) for i, item in enumerate(items)]
    found: list[tuple[int, Item]] = gather_object(numbered)
    return [item for _, item in sorted(found, key=lambda pair: pair[0])]


def total(parts: Sequence[Mapping[str, Tensor | float]]) -> dict[str, float]:
    """Sums by name over the parts of all ranks, added in one order so that every rank gets the same bits."""
    everything = gather([{name: float(value) for name, value in part.items()} for part in parts])
    return {name: sum(part[name] for part in everything) for name in everything[0]} if everything else {}


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by its sum over ranks. One that no rank has stays None.

    The gradients of sharded parameters are such sums already.
    """
    parameters = [p for p in parameters if not is_sharded(p)]
    if count() == 1 or not parameters:
        return
    import torch

    device = parameters[0].device
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=device)
    torch.distributed.all_reduce(present)
    wanted = [p for p, n in zip(parameters, present.tolist(), strict=True) if n]
    if not wanted:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in wanted])
    torch.distributed.all_reduce(flat)
    for parameter, part in zip(wanted, flat.split([p.numel() for p in wanted]), strict=True):
        parameter.grad = part.view_as(parameter).clone()
