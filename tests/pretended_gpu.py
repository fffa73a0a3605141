"""A GPU that is none: tensors that say they are on `cuda:0`, are computed on the CPU, and meet others as a
GPU's would.

Everything runs, with real numbers: models, autograd, optimizers, generation. What a GPU refuses is refused
here too: an operation over tensors of both devices, and a generator of the CPU for a tensor of the GPU.
Inside of torch they are tensors of the device `meta`, which needs no driver for its backward pass. Kernels,
types chosen by autocast, memory and speed are not the GPU's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
# Where a GPU takes a CPU's tensor: copies, and the index of an indexing.
COPIES = {aten.to, aten._to_copy, aten.copy_}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class MixedDevicesError(RuntimeError):
    pass


class OnGPU(Tensor):
    """`held` is where the numbers are."""

    held: Tensor
    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        self = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device="meta"
        )
        self.held = held
        return self

    def __repr__(self, *, tensor_contents=None):
        return f"OnGPU({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def is_gpu(device) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "meta")


def compute(func, args, kwargs):
    """Run an operation on what its tensors hold; the result is on the GPU if the operation is."""
    leaves = tree_leaves((args, kwargs))
    there = any(isinstance(leaf, OnGPU) for leaf in leaves)
    if "device" in kwargs and kwargs["device"] is not None:
        there = is_gpu(kwargs["device"])
        kwargs = kwargs | {"device": torch.device("cpu")}
    elif func is aten.copy_.default:
        there = isinstance(args[0], OnGPU)
    if func.overloadpacket not in COPIES:
        refuse_mixtures(func, args, kwargs, there)
    owners = {id(leaf.held): leaf for leaf in leaves if isinstance(leaf, OnGPU)}
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, OnGPU) else x, (args, kwargs))
    with torch.no_grad():
        found = func(*args, **kwargs)
    if not there:
        return found

    def placed(x):
        return x if type(x) is not Tensor else owners[id(x)] if id(x) in owners else OnGPU(x)

    return tree_map(placed, found)


def refuse_mixtures(func, args, kwargs, there: bool) -> None:
    """Raises MixedDevicesError; numbers, tensors without a dimension, may come from the CPU."""
    looked_at = (args[0], *args[2:]) if func in INDEXING else args
    tensors = [leaf for leaf in tree_leaves((looked_at, kwargs)) if isinstance(leaf, Tensor)]
    strange = [x for x in tensors if not isinstance(x, OnGPU) and x.dim() > 0]
    if there and strange:
        raise MixedDevicesError(f"{func}: a tensor of the CPU, {tuple(strange[0].shape)}, meets the GPU's")
    if func in INDEXING and not there and any(isinstance(x, OnGPU) for x in tree_leaves(args[1])):
        raise MixedDevicesError(f"{func}: the index is on the GPU, the tensor on the CPU")
    generators = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Generator)]
    if there and generators:
        raise MixedDevicesError(f"{func}: a generator of the CPU for a tensor of the GPU")


class PretendedGPU(TorchDispatchMode):
    """New tensors of the device cuda are `OnGPU` inside."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._can_decompose():  # in inference mode what is made of other operations arrives whole
            with self:
                return func.decompose(*args, **kwargs)
        return compute(func, args, kwargs)


class Numbers(TorchFunctionMode):
    """What torch makes of Python's numbers, and back, goes to a device below what a dispatch mode sees."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is Tensor.tolist:
            return func(args[0].cpu())
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], OnGPU):
            index = tree_map_only(list, torch.tensor, args[1], is_leaf=lambda x: isinstance(x, list))
            return func(args[0], index, *args[2:])
        if func is Tensor.to and len(args) > 1 and args[1] == torch.device("cuda"):
            return func(args[0], GPU, *args[2:], **kwargs)
        if func is not torch.tensor or torch.device(kwargs.get("device") or "cpu").type != "cuda":
            return func(*args, **kwargs)
        del kwargs["device"]
        return OnGPU(func(*args, **kwargs))


@contextmanager
def pretended_gpu(monkeypatch) -> Iterator[PretendedGPU]:
    """Inside, torch finds a GPU, `Module.to` brings models there, and files are written from the CPU."""
    from transformers import PreTrainedModel

    plain, saved = nn.Module.to, PreTrainedModel.save_pretrained
    loaded = PreTrainedModel.from_pretrained.__func__

    def to(module, *args, **kwargs):
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        return move(module, there) if is_gpu(device) else plain(module, *args, **kwargs)

    def save(model, *args, **kwargs):
        return saved(move(model, back), *args, **kwargs)

    def load(cls, *args, **kwargs):
        with _disable_current_modes():  # it builds models on the true device meta
            return loaded(cls, *args, **kwargs)

    with monkeypatch.context() as patch, Numbers(), PretendedGPU() as mode:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        # A build of torch for CUDA would ask a driver which stream an optimizer steps in.
        patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
        patch.setattr(nn.Module, "to", to)
        patch.setattr(PreTrainedModel, "save_pretrained", save)
        patch.setattr(PreTrainedModel, "from_pretrained", classmethod(load))
        yield mode


def move(module: nn.Module, place) -> nn.Module:
    """Put every parameter and buffer where `place` puts it; shared ones stay shared."""
    placed: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                new = nn.Parameter(place(parameter.detach()), requires_grad=parameter.requires_grad)
                part._parameters[name] = placed.setdefault(id(parameter), new)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else place(buffer)
    return module


def there(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, OnGPU) else OnGPU(tensor)


def back(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, OnGPU) else tensor
