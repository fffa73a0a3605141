"""Liger's Triton kernels (Hsu et al. 2024) in a model that transformers computes on a GPU.

They take the place of its norms, its SwiGLU and its rotary embedding, each with a backward pass of its own
that keeps less. Liger's fused loss is left out: losses here need the log-probabilities of response tokens.
The package is optional: `pip install '.[liger]'`.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_core.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Kernels = Literal["plain", "liger"]
LIGER = "liger_kernel.transformers.monkey_patch"


def check_kernels(kernels: Kernels, model: Path, device: torch.device) -> None:
    """Raises InputError, before the model in the directory `model` is loaded, where they cannot be used."""
    if kernels == "plain":
        return
    if device.type != "cuda":
        raise InputError(f"model.kernels = 'liger': they run on a GPU, not on a {device.type}; use plain")
    known = _liger().MODEL_TYPE_TO_APPLY_LIGER_FN
    kind = json.loads((model / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind not in known:
        raise InputError(f"model.kernels = 'liger': it knows no {kind}, which {model} is; use plain")


def use_kernels(kernels: Kernels, model: PreTrainedModel) -> None:
    """Patch `model` in place. The rotary embedding is a function of transformers' module: it is patched for
    every model of the kind in this process."""
    if kernels == "liger":
        _liger()._apply_liger_kernel_to_instance(
            model,
            rope=True,
            rms_norm=True,
            swiglu=True,
            cross_entropy=False,
            fused_linear_cross_entropy=False,
        )


def _liger() -> Any:
    try:
        return importlib.import_module(LIGER)
    except ImportError as error:
        raise InputError(
            f"model.kernels = 'liger': cannot import liger-kernel ({error}); pip install '.[liger]', or use "
            "plain"
        ) from None
