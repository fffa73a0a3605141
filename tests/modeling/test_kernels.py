"""Liger's kernels, by a stand-in that swaps norms and SwiGLU as the package does; tests/gpu has the real."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from rlhf_core.config import LoRAConfig, RunConfig, parse_params, read_yaml
from rlhf_core.errors import InputError
from rlhf_core.modeling import kernels
from rlhf_core.modeling.loading import load_policy
from rlhf_core.modeling.roles import REFERENCE, AdapterRoles
from tests.pretended_gpu import pretended_gpu

GPU = RunConfig(seed=0, device="cuda", num_processes=1, sharding="none", precision="float32")
CPU = GPU.model_copy(update={"device": "cpu"})
IDS = [[5, 9, 3, 7], [8, 2, 6, 1]]


@pytest.fixture
def liger(monkeypatch):
    """Modules that look like the package's; `calls` holds how it was applied and which parts then ran."""
    patch = types.ModuleType(kernels.LIGER)
    patch.calls = []

    def bind(module, forward):
        module.__dict__["forward"] = forward.__get__(module, module.__class__)

    def norm(self, x):
        patch.calls.append("norm")
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def swiglu(self, x):  # as LigerSwiGLUMLP.forward calls the projections
        patch.calls.append("swiglu")
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    def apply(model, **parts):
        patch.calls.append(parts)
        bind(model.model.norm, norm)
        for layer in model.model.layers:
            bind(layer.mlp, swiglu)
            bind(layer.input_layernorm, norm)
            bind(layer.post_attention_layernorm, norm)

    patch._apply_liger_kernel_to_instance = apply
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, kernels.LIGER, patch)
    return patch


def states(directory, which):
    """Hidden states of a policy whose adapter changes much, and of its reference."""
    roles = AdapterRoles(*load_policy(directory, GPU, kernels=which), LoRAConfig(rank=4, alpha=8.0))
    roles.add("policy", seed=0)
    for number, parameter in enumerate(roles.parameters("policy")):
        generator = torch.Generator().manual_seed(number)
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    with torch.no_grad():
        ids = torch.tensor(IDS).to(roles.device)
        return [roles.hidden(role, ids).cpu() for role in ("policy", REFERENCE)]


def test_norms_and_swiglu_are_its_own_and_adapters_still_count(tiny_model_dir, liger, monkeypatch):
    with pretended_gpu(monkeypatch):
        expected = states(tiny_model_dir, "plain")
        assert liger.calls == []
        found = states(tiny_model_dir, "liger")
    off = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert liger.calls[0] == {"rope": True, "rms_norm": True, "swiglu": True} | off
    assert liger.calls[1:].count("swiglu") == 2 * 2  # blocks, roles
    assert liger.calls[1:].count("norm") == 2 * (2 * 2 + 1)
    torch.testing.assert_close(found, expected)
    assert (found[0] - found[1]).abs().max() > 0.1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cpu_is_refused_before_the_model_is_loaded(tiny_model_dir):
    with pytest.raises(InputError, match=r"model\.kernels = 'liger': they run on a GPU, not on a cpu"):
        load_policy(tiny_model_dir, CPU, kernels="liger")


def test_a_missing_package_and_a_strange_model_are_named(tiny_model_dir, monkeypatch, liger):
    gpu = torch.device("cuda")
    liger.MODEL_TYPE_TO_APPLY_LIGER_FN.clear()
    with pytest.raises(InputError, match=r"model\.kernels = 'liger': it knows no llama"):
        kernels.check_kernels("liger", tiny_model_dir, gpu)
    monkeypatch.setitem(sys.modules, kernels.LIGER, None)
    with pytest.raises(InputError, match=r"cannot import liger-kernel .* pip install '\.\[liger\]'"):
        kernels.check_kernels("liger", tiny_model_dir, gpu)
    kernels.check_kernels("plain", tiny_model_dir, gpu)


def test_params_refuse_it_on_a_cpu(root):
    tree = read_yaml(root / "params.yaml")
    tree["model"]["kernels"] = "liger"
    assert parse_params(tree, "params.yaml").model.kernels == "liger"
    tree["run"]["device"] = "cpu"
    with pytest.raises(InputError, match=r"model\.kernels \(liger\) must be plain when run\.device is cpu"):
        parse_params(tree, "params.yaml")
