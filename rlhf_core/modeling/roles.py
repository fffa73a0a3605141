"""The models of a training run by role: adapters on one shared frozen base, or one full model each.

Roles are "policy", "critic", "reference" and "reward", and in an ensemble "reward_1" and so on. Both classes
answer the same three questions: the hidden states of a role, its logits, its trainable parameters.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_core.config import LoRAConfig, Params
from rlhf_core.modeling import lora, sharding
from rlhf_core.modeling.flops import Flops
from rlhf_core.modeling.loading import load_policy, load_tokenizer, resolve_device, resolve_dtype
from rlhf_core.modeling.trunk import last_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REFERENCE = "reference"


class AdapterRoles:
    """Every role is an adapter on one base; the reference is the base with no adapter."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: LoRAConfig,
        *,
        recompute: bool = False,
    ) -> None:
        self._recompute = recompute
        self.tokenizer = tokenizer
        self.device = model.device
        self._model = model
        self._config = config
        self._active = lora.adapt(model, config)
        self._names: list[str] = []

    def add(self, role: str, *, seed: int, start: Path | None = None) -> None:
        """Add a role; `start` is a model directory whose adapter it takes over."""
        self._names.append(role)
        lora.add_adapter(self._model, role, seed)
        if start is not None:
            lora.load_adapter_state(self._model, role, lora.read_adapter(start / "adapter"))

    @contextlib.contextmanager
    def using(self, role: str) -> Iterator[PreTrainedModel]:
        """The model as `role` sees it, for generation."""
        before = self._active.name
        self._active.name = None if role == REFERENCE else role
        try:
            yield self._model
        finally:
            self._active.name = before

    def shard(self) -> None:
        """Split the weights over the ranks, where that is asked for; all roles have been added."""
        sharding.shard_blocks(self._model)

    def gathered(self) -> AbstractContextManager[None]:
        """Whole weights, for passes without gradient; all ranks enter and leave together."""
        return sharding.gathered([self._model])

    def unshard(self) -> None:
        """Make the weights whole to `export` them. All ranks take part, the first one gets them."""

        def build() -> PreTrainedModel:
            plain = like(self._model)
            lora.adapt(plain, self._config)
            for role in self._names:
                lora.add_adapter(plain, role, seed=0)
            return plain

        self._model = sharding.unsharded(self._model, build)

    def hidden(self, role: str, *inputs: Any) -> Tensor:
        """Last hidden states (S, T, D) of `TokenBatch.inputs`."""
        with self.using(role) as model:
            again = partial(self.using, role) if self._recompute else None
            return last_hidden(model, *inputs, recompute_in=again)

    def logits(self, role: str, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V)."""
        return self._model.get_output_embeddings()(hidden)

    def flops(self, role: str) -> Flops:
        return Flops.of(self._model, "lora")

    def parameters(self, role: str) -> list[nn.Parameter]:
        layers = [layer for _, layer in lora.adapted_layers(self._model)]
        return [p for layer in layers for p in (layer.lora_A[role], layer.lora_B[role])]

    def save_adapter(self, role: str, directory: Path, task_type: str = "CAUSAL_LM") -> None:
        """Leave the role's adapter in `directory`, which is made."""
        lora.save_adapter(self._model, role, self._config, directory, task_type)

    def export(
        self, role: str, directory: Path, task_type: str, *, more_to_come: bool = False
    ) -> PreTrainedModel:
        """Save the adapter below `directory` and return the merged model.

        No role can be used afterwards, unless there is `more_to_come`: then a copy of the model is merged.
        """
        self.save_adapter(role, directory / "adapter", task_type)
        model = copy.deepcopy(self._model) if more_to_come else self._model
        lora.merge_adapter(model, role)
        return model


class FullRoles:
    """Every role is a model of its own; trained ones keep float32 weights and compute in `dtype`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, params: Params) -> None:
        self.tokenizer = tokenizer
        self.device = resolve_device(params.run)
        self._run = params.run
        self._recompute = params.model.gradient_checkpointing
        self._kernels = params.model.kernels
        self._dtype = resolve_dtype(params.run, self.device)
        self._models: dict[str, PreTrainedModel] = {}

    def add(self, role: str, *, path: Path, trained: bool = True) -> None:
        """Load a role's causal language model, or the trunk of a reward model, from `path`."""
        dtype = torch.float32 if trained else self._dtype
        model, _ = load_policy(path, self._run, dtype=dtype, kernels=self._kernels)
        self._models[role] = model.requires_grad_(trained)

    @contextlib.contextmanager
    def using(self, role: str) -> Iterator[PreTrainedModel]:
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            yield self._models[role]

    def shard(self) -> None:
        for model in self._models.values():
            sharding.shard_blocks(model)

    def gathered(self) -> AbstractContextManager[None]:
        return sharding.gathered(self._models.values())

    def unshard(self) -> None:
        for role, model in self._models.items():
            if any(p.requires_grad for p in model.parameters()):
                self._models[role] = sharding.unsharded(model, partial(like, model))

    def hidden(self, role: str, *inputs: Any) -> Tensor:
        with self.using(role) as model:
            again = partial(self.using, role) if self._recompute else None
            return last_hidden(model, *inputs, recompute_in=again)

    def logits(self, role: str, hidden: Tensor) -> Tensor:
        with self.using(role) as model:
            return model.get_output_embeddings()(hidden)

    def flops(self, role: str) -> Flops:
        return Flops.of(self._models[role], "full")

    def parameters(self, role: str) -> list[nn.Parameter]:
        """The trunk, and the language-model head only where it is used or shared with the embedding."""
        model = self._models[role]
        return list((model if role == "policy" else model.base_model).parameters())

    def export(
        self, role: str, directory: Path, task_type: str, *, more_to_come: bool = False
    ) -> PreTrainedModel:
        return self._models.pop(role)


Roles = AdapterRoles | FullRoles


def like(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same shape and type on the CPU; its weights are not those of `model`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(model.config, dtype=model.dtype).eval()


def adapter_roles(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, params: Params) -> AdapterRoles:
    config = params.model
    return AdapterRoles(model, tokenizer, config.lora, recompute=config.gradient_checkpointing)


def open_roles(params: Params, base: Path, *, trained: Sequence[str], seed: int) -> Roles:
    """Trained roles on top of `base`, by adapters or by all weights as `model.finetuning` says."""
    if params.model.finetuning == "full":
        full = FullRoles(load_tokenizer(base), params)
        for role in trained:
            full.add(role, path=base)
        full.shard()
        return full
    model, tokenizer = load_policy(base, params.run, kernels=params.model.kernels)
    adapted = adapter_roles(model, tokenizer, params)
    for i, role in enumerate(trained):
        adapted.add(role, seed=seed + i)
    adapted.shard()
    return adapted
