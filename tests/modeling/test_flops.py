"""Counted operations against those that torch sees."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rlhf_core.config import LoRAConfig, RunConfig
from rlhf_core.modeling import lora
from rlhf_core.modeling.flops import Flops
from rlhf_core.modeling.loading import load_policy

RUN = RunConfig(seed=0, device="cpu", num_processes=1, sharding="none", precision="float32")
TOKENS = 24
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm}


@pytest.fixture
def model(tiny_model_dir):
    return load_policy(tiny_model_dir, RUN)[0]


def products(work, among=PRODUCTS):
    """Operations of products with weights; attention's own are batched and not among them."""
    with FlopCounterMode(display=False) as counter:
        work()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for op, count in counts.items() if op in among)


def loss(model):
    ids = torch.arange(5, 5 + TOKENS)[None]
    return model(input_ids=ids, labels=ids).loss


def test_forward_is_what_torch_counts(model):
    with torch.no_grad():
        seen = products(lambda: loss(model))
    assert Flops.of(model, "full").forward(TOKENS, TOKENS) == seen
    trunk_only = Flops.of(model, "full").forward(TOKENS)
    assert 0 < trunk_only < seen


def test_training_every_weight_is_three_forwards(model):
    model.requires_grad_(True)
    seen = products(lambda: loss(model).backward())
    assert Flops.of(model, "full").training(TOKENS, TOKENS) == seen


def test_training_adapters_is_two_forwards_and_the_adapters(model):
    active = lora.adapt(model, LoRAConfig(rank=1, alpha=1.0))
    lora.add_adapter(model, "policy", seed=0)
    active.name = "policy"
    seen = products(lambda: loss(model).backward())
    assert Flops.of(model, "lora").training(TOKENS, TOKENS) == pytest.approx(seen, rel=0.15)


def test_attention_is_half_of_what_torch_counts_without_a_mask_and_the_diagonal(model):
    model.set_attn_implementation("eager")
    model.requires_grad_(True)
    with torch.no_grad():
        forward = products(lambda: loss(model), {torch.ops.aten.bmm})
    both = products(lambda: loss(model).backward(), {torch.ops.aten.bmm})
    flops = Flops.of(model, "lora")
    seen = (TOKENS + 1) / (2 * TOKENS)  # the pairs of a token and one that it sees
    assert flops.attention(TOKENS) == pytest.approx(seen * forward)
    assert flops.attention(TOKENS, training=True) == pytest.approx(seen * both)
