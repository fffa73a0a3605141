from types import SimpleNamespace

import pytest
import torch

from rlhf_core.config import LoRAConfig, RunConfig
from rlhf_core.modeling import blocks
from rlhf_core.modeling.blocks import SHORT_SEQUENCE
from rlhf_core.modeling.loading import load_policy
from rlhf_core.modeling.lora import adapted_layers
from rlhf_core.modeling.roles import REFERENCE, AdapterRoles

RUN = RunConfig(seed=0, device="cpu", num_processes=1, sharding="none", precision="float32")
LORA = LoRAConfig(rank=4, alpha=8.0)
IDS = torch.tensor([[5, 9, 3, 7], [8, 2, 6, 1]])


@pytest.fixture
def roles(tiny_model_dir):
    model, tokenizer = load_policy(tiny_model_dir, RUN)
    roles = AdapterRoles(model, tokenizer, LORA)
    roles.add("policy", seed=0)
    return roles


def plain_hidden(tiny_model_dir):
    """What the model says without this project's code, by the attention that short sequences get."""
    plain, _ = load_policy(tiny_model_dir, RUN)
    plain.set_attn_implementation("eager")
    return plain.base_model(input_ids=IDS).last_hidden_state


def randomise(roles, role, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in roles.parameters(role):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def test_new_adapter_changes_nothing(roles, tiny_model_dir):
    torch.testing.assert_close(roles.hidden("policy", IDS), roles.hidden(REFERENCE, IDS), rtol=0, atol=0)
    expected = plain_hidden(tiny_model_dir)
    torch.testing.assert_close(roles.hidden("policy", IDS), expected, rtol=1e-5, atol=1e-6)


def test_attention_of_transformers_is_the_plain_one_for_short_sequences_only(roles, monkeypatch):
    monkeypatch.setattr(blocks, "applies_to", lambda model: False)
    used = []
    with roles.using("policy") as model:
        monkeypatch.setattr(
            type(model.base_model),
            "forward",
            lambda self, **inputs: (
                used.append(self.config._attn_implementation) or SimpleNamespace(last_hidden_state=None)
            ),
        )
        before = model.config._attn_implementation
        roles.hidden("policy", torch.zeros(1, SHORT_SEQUENCE, dtype=torch.long))
        roles.hidden("policy", torch.zeros(1, SHORT_SEQUENCE + 1, dtype=torch.long))
        assert used == ["eager", before]
        assert model.config._attn_implementation == before != "eager"


def test_adapter_off_equals_the_plain_model(roles, tiny_model_dir):
    randomise(roles, "policy")
    expected = plain_hidden(tiny_model_dir)
    torch.testing.assert_close(roles.hidden(REFERENCE, IDS), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(roles.hidden("policy", IDS), expected)


def test_adapters_do_not_touch_each_other(roles):
    roles.add("critic", seed=3)
    before = roles.hidden("critic", IDS)
    randomise(roles, "policy")
    torch.testing.assert_close(roles.hidden("critic", IDS), before, rtol=0, atol=0)


def test_only_the_adapter_of_a_role_gets_gradients(roles):
    roles.add("critic", seed=3)
    roles.hidden("policy", IDS).sum().backward()
    assert all(p.grad is not None for p in roles.parameters("policy"))
    assert all(p.grad is None for p in roles.parameters("critic"))
    with roles.using(REFERENCE) as model:
        assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)


def test_merged_model_gives_what_the_adapter_gave(roles, tmp_path):
    randomise(roles, "policy")
    expected = roles.hidden("policy", IDS)
    merged = roles.export("policy", tmp_path, "CAUSAL_LM")
    assert not list(adapted_layers(merged))
    torch.testing.assert_close(
        merged.base_model(input_ids=IDS).last_hidden_state, expected, rtol=1e-4, atol=1e-4
    )


def test_saved_adapter_opens_with_peft_and_gives_the_same(roles, tiny_model_dir, tmp_path):
    peft = pytest.importorskip("peft")
    randomise(roles, "policy")
    expected = roles.hidden("policy", IDS)
    roles.export("policy", tmp_path, "CAUSAL_LM")
    plain, _ = load_policy(tiny_model_dir, RUN)
    other = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    found = other.base_model.model.model(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_recomputed_activations_give_the_same_gradients_and_keep_less(tiny_model_dir):
    gradients, kept = {}, {False: 0, True: 0}
    for recompute in (False, True):
        model, tokenizer = load_policy(tiny_model_dir, RUN)
        roles = AdapterRoles(model, tokenizer, LORA, recompute=recompute)
        for seed, role in enumerate(("policy", "critic")):
            roles.add(role, seed=seed)
            randomise(roles, role)

        def count(tensor, to=recompute):
            kept[to] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            both = [roles.hidden(role, IDS) for role in ("policy", "critic")]
        torch.cat(both).pow(3).sum().backward()  # each role is recomputed as itself, after both ran
        gradients[recompute] = [p.grad for role in ("policy", "critic") for p in roles.parameters(role)]
        assert not any(block.training for block in model.base_model.layers)
    for plain, again in zip(gradients[False], gradients[True], strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=0)
    assert kept[True] < 0.5 * kept[False]
