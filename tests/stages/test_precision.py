"""The precision that models are computed in, by what the processor can do."""

import json

import pytest
import torch

from rlhf_core.modeling.loading import precision_warning, resolve_device, resolve_dtype
from rlhf_core.stages.runner import run_stage


@pytest.fixture
def processor(monkeypatch):
    def has(bfloat16):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bfloat16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)

    return has


@pytest.mark.parametrize(
    ("precision", "has", "dtype", "warns"),
    [
        ("auto", True, torch.bfloat16, False),
        ("auto", False, torch.float32, False),
        ("float32", True, torch.float32, False),
        ("bfloat16", True, torch.bfloat16, False),
        ("bfloat16", False, torch.bfloat16, True),
    ],
)
def test_auto_follows_the_processor_and_what_it_lacks_is_said(
    small_params, processor, precision, has, dtype, warns
):
    processor(bfloat16=has)
    run = small_params.run.model_copy(update={"precision": precision, "device": "cpu"})
    assert resolve_dtype(run, resolve_device(run)) == dtype
    assert bool(precision_warning(run)) == warns


def test_a_stage_says_that_its_precision_is_slow_here(workspace, small_params, processor):
    processor(bfloat16=False)
    run = small_params.run.model_copy(update={"precision": "bfloat16", "device": "cpu"})
    sft = small_params.sft.model_copy(update={"num_rows": 8, "num_epochs": 1, "num_eval_rows": 4})
    run_stage("sft", small_params.model_copy(update={"run": run, "sft": sft}), workspace)
    found = json.loads((workspace.run_dir("sft") / "warnings.json").read_text())
    assert "run.precision = 'bfloat16'" in found["precision"]
