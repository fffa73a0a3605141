"""Opening models and tokenizers from Hugging Face directories, on the right device in the right type."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_core import collector, ranks
from rlhf_core.config import RunConfig
from rlhf_core.errors import InputError
from rlhf_core.modeling.kernels import Kernels, check_kernels, use_kernels

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Messages = list[dict[str, str]]


def resolve_device(run: RunConfig) -> torch.device:
    """Raises InputError when a GPU is asked for and there is none."""
    import torch  # here and below: stages that only look at a directory start a second or two earlier

    if run.device == "cuda" and not torch.cuda.is_available():
        raise InputError("run.device = 'cuda': torch finds no GPU here; use auto or cpu")
    kind = run.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and ranks.count() > 1:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(kind)


def resolve_dtype(run: RunConfig, device: torch.device) -> torch.dtype:
    """The type that matrix products are computed in."""
    import torch

    if run.precision != "auto":
        return getattr(torch, run.precision)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def precision_warning(run: RunConfig) -> str:
    """What to say of a precision that this processor has no instructions for; empty when it has."""
    if run.precision != "bfloat16" or resolve_device(run).type != "cpu" or _cpu_has_bfloat16():
        return ""
    return (
        "run.precision = 'bfloat16': this processor has no instructions for it, and products take many times "
        "as long as in float32; auto takes the faster of the two"
    )


def use_determinism(device: torch.device) -> None:
    """Make a repetition give the same bits on a CPU, and on a GPU nearly, at some cost in speed.

    There the gradient of fused attention still adds in any order: torch makes it exact only where all else
    that is not would be an error.
    """
    import torch

    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms would import the compiler, 2 s
    # Else torch fills every new tensor with NaN, 3 % of a training step; nothing here reads one unwritten.
    torch.utils.deterministic.fill_uninitialized_memory = False


def check_model_dir(path: Path) -> None:
    """Raises InputError when `path` is no finished Hugging Face model directory."""
    if not path.is_dir():
        raise InputError(f"{path}: no such model directory; run the stage that makes it, or `rlhf run`")
    for name in ("config.json", "tokenizer_config.json"):
        if not (path / name).is_file():
            raise InputError(f"{path}: not a model directory: {name} is missing")
    if not any(path.glob("*.safetensors")):
        raise InputError(f"{path}: not a model directory: no .safetensors file")


@collector.paused()
def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    check_model_dir(path)
    return AutoTokenizer.from_pretrained(path, local_files_only=True)


@collector.paused()
def load_policy(
    path: Path, run: RunConfig, *, dtype: torch.dtype | None = None, kernels: Kernels = "plain"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in eval mode; `dtype` defaults to the computing type of this machine.

    Raises InputError for a directory that is absent or damaged, and for kernels that cannot be used.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    check_model_dir(path)
    device = resolve_device(run)
    check_kernels(kernels, path, device)
    use_determinism(device)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or resolve_dtype(run, device), local_files_only=True, attn_implementation="sdpa"
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}: cannot load the model: {' '.join(str(error).split())[:300]}") from error
    except Exception as error:  # safetensors raises a type of its own for a damaged file
        if type(error).__name__ != "SafetensorError":
            raise
        raise InputError(f"{path}: damaged weights: {error}") from error
    model.eval()
    use_kernels(kernels, model)
    return model.to(device), load_tokenizer(path)


def write_provenance(directory: Path, facts: dict[str, object]) -> None:
    """Leave a provenance.json beside the weights: what they were made from."""
    (directory / "provenance.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def read_provenance(directory: Path) -> dict[str, object]:
    path = directory / "provenance.json"
    return json.loads(path.read_text()) if path.is_file() else {}
