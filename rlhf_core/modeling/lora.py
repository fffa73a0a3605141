"""Low-rank adapters (Hu et al. 2021) by name on one frozen base: y = W x + (alpha / rank) B A x.

Several roles (policy, critic, reward) share the base; which adapter counts is switched, not loaded, and with
none active the base answers exactly as it would without this module.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlhf_core.config import LoRAConfig
from rlhf_core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class ActiveAdapter:
    """The switch that all adapted layers of one model look at."""

    name: str | None = None


class LoRALinear(nn.Module):
    """A frozen linear layer with adapters in float32; their product is computed in the type of the input."""

    def __init__(self, base: nn.Linear, config: LoRAConfig, active: ActiveAdapter) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank, self.scale = config.rank, config.scale
        self.active = active
        self.lora_A = nn.ParameterDict()  # name -> (rank, in)
        self.lora_B = nn.ParameterDict()  # name -> (out, rank)

    def add(self, name: str, generator: torch.Generator) -> None:
        """A starts as nn.Linear's weight does, B at zero: a new adapter changes nothing."""
        device = self.base.weight.device
        weight = torch.empty(self.rank, self.base.in_features)
        bound = 1 / math.sqrt(self.base.in_features)
        weight.uniform_(-bound, bound, generator=generator)
        self.lora_A[name] = nn.Parameter(weight.to(device))
        self.lora_B[name] = nn.Parameter(torch.zeros(self.base.out_features, self.rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        name = self.active.name
        if name is None:
            return y
        low = nn.functional.linear(x, self.lora_A[name].to(x.dtype))
        return y + nn.functional.linear(low, (self.scale * self.lora_B[name]).to(x.dtype))

    def delta(self, name: str) -> Tensor:
        """The adapter as one float32 update of the weight, (out, in)."""
        return self.scale * (self.lora_B[name].detach() @ self.lora_A[name].detach())


def adapt(model: PreTrainedModel, config: LoRAConfig) -> ActiveAdapter:
    """Freeze `model` and wrap every linear layer of its trunk (not the head) for adapters."""
    active = ActiveAdapter()
    model.requires_grad_(False)
    linears = [(n, m) for n, m in model.base_model.named_modules() if isinstance(m, nn.Linear)]
    for name, linear in linears:
        parent, _, leaf = name.rpartition(".")
        setattr(model.base_model.get_submodule(parent), leaf, LoRALinear(linear, config, active))
    return active


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def add_adapter(model: nn.Module, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, layer in adapted_layers(model):
        layer.add(name, generator)


def adapter_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Weights of one adapter under the names that PEFT gives them."""
    state = {}
    for path, layer in adapted_layers(model):
        state[f"base_model.model.{path}.lora_A.weight"] = layer.lora_A[name].detach()
        state[f"base_model.model.{path}.lora_B.weight"] = layer.lora_B[name].detach()
    return state


def load_adapter_state(model: nn.Module, name: str, state: Mapping[str, Tensor]) -> None:
    """Fill an adapter that was added; raises KeyError when a layer is missing in `state`."""
    with torch.no_grad():
        for path, layer in adapted_layers(model):
            layer.lora_A[name].copy_(state[f"base_model.model.{path}.lora_A.weight"])
            layer.lora_B[name].copy_(state[f"base_model.model.{path}.lora_B.weight"])


def merge_adapter(model: PreTrainedModel, name: str) -> None:
    """Write the adapter into the weights, in float32, and take the wrappers off. The model is plain again."""
    for path, layer in list(adapted_layers(model)):
        weight = layer.base.weight
        merged = (weight.float() + layer.delta(name)).to(weight.dtype)
        layer.base.weight = nn.Parameter(merged, requires_grad=False)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.base)


def save_adapter(
    model: PreTrainedModel, name: str, config: LoRAConfig, directory: Path, task_type: str
) -> None:
    """Leave the adapter in PEFT's file format, for tools that read it."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    state = {key: value.contiguous().cpu() for key, value in adapter_state(model, name).items()}
    save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    facts = {
        "peft_type": "LORA",
        "task_type": task_type,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({path.rpartition(".")[2] for path, _ in adapted_layers(model)}),
        "base_model_name_or_path": None,
    }
    (directory / "adapter_config.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def read_adapter(directory: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "adapter_model.safetensors")


def check_fits(start: Path, base: Path, config: LoRAConfig) -> None:
    """Raises InputError unless the adapter of the model `start` has the shape that training on `base` wants.

    On the weights that it was trained on, `base` with the adapter is the model `start`. On other weights of
    the same shape it is what `start` has learnt on top of its own base, put on this one.
    """
    path = start / "adapter" / "adapter_config.json"
    if not path.is_file():
        raise InputError(f"{start}: has no adapter, which model.finetuning = lora needs to start from it")
    facts = json.loads(path.read_text(encoding="utf-8"))
    if (facts["r"], facts["lora_alpha"]) != (config.rank, config.alpha):
        raise InputError(
            f"{start}: its adapter has rank {facts['r']} and alpha {facts['lora_alpha']:g}; training asks "
            f"for model.lora.rank {config.rank} and model.lora.alpha {config.alpha:g}"
        )
    shapes = [json.loads((at / "config.json").read_text(encoding="utf-8")) for at in (start, base)]
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        if shapes[0].get(key) != shapes[1].get(key):
            raise InputError(
                f"{start}: {key} is {shapes[0].get(key)}, that of {base} is {shapes[1].get(key)}; its "
                "adapter does not fit there"
            )
