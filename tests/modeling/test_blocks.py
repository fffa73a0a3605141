"""The project's own computation of Llama-like blocks against that of transformers, on random small models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
)

from rlhf_core.config import LoRAConfig, RunConfig
from rlhf_core.modeling import blocks, lora, products, ragged, running
from rlhf_core.modeling.blocks import SHORT_SEQUENCE, Block
from rlhf_core.modeling.encoding import make_batch
from rlhf_core.modeling.loading import load_policy, load_tokenizer
from rlhf_core.modeling.products import PackedProduct, Product
from rlhf_core.modeling.roles import FullRoles
from rlhf_core.modeling.running import CachedRows, StaticRows
from rlhf_core.modeling.trunk import last_hidden
from rlhf_core.optim import make_optimizer, step_if_finite

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "llama, wide heads": LlamaConfig(**SHAPE, head_dim=16, rope_parameters=LLAMA3),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),  # with biases
}
PROMPTS = [[11, 12, 13] * 4, [11, 12, 13] * 4, [5, 6] * 5, [7]]
RESPONSES = [[4, 5], [6, 7, 8, 9], [9], [3, 2, 1]]


def make(config, dtype=torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.normal_(mean=float("norm" in name))
    return model


@pytest.fixture(params=CONFIGS)
def model(request):
    return make(CONFIGS[request.param])


@pytest.fixture
def llama():
    return make(CONFIGS["llama"])


def theirs(model, *inputs, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "applies_to", lambda model: False)
        return last_hidden(model, *inputs)


def gradients(model, hidden):
    """Of a loss that every hidden state counts in, differently."""
    model.zero_grad(set_to_none=True)
    weights = torch.linspace(-1.0, 1.0, hidden.numel()).view(hidden.shape)
    (hidden.float() * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-7
        )


def batches():
    ids = torch.randint(0, 97, (3, 11), generator=torch.Generator().manual_seed(1))
    shared = make_batch(PROMPTS, RESPONSES, 0, torch.device("cpu"), row_tokens=40)
    assert shared.visible is not None
    return {"rows": (ids, None, None), "prompts shared and packed": shared.inputs}


@pytest.mark.parametrize("kind", batches())
def test_hidden_states_and_every_gradient_are_those_of_transformers(model, kind, monkeypatch):
    inputs = batches()[kind]
    assert blocks.applies_to(model)
    expected = theirs(model, *inputs, monkeypatch=monkeypatch)
    found = last_hidden(model, *inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert_same_gradients(gradients(model, found), gradients(model, expected))
    with torch.no_grad():
        torch.testing.assert_close(last_hidden(model, *inputs), expected, rtol=1e-4, atol=1e-5)


LENGTHS = [3, 40, 41, 4, 90, 17]


def test_products_see_no_padding_and_nothing_changes_for_real_tokens(model, monkeypatch):
    torch.manual_seed(1)
    ids = torch.randint(0, 97, (len(LENGTHS), max(LENGTHS)))
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    widths = []
    plain = Block.__call__
    monkeypatch.setattr(
        Block, "__call__", lambda self, x, attend: widths.append(len(x)) or plain(self, x, attend)
    )
    found = last_hidden(model, ids, None, None, LENGTHS)
    assert set(widths) == {sum(LENGTHS)}
    expected = theirs(model, ids, None, None, LENGTHS, monkeypatch=monkeypatch)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
    assert not found[~real].any()
    assert_same_gradients(gradients(model, found[real]), gradients(model, expected[real]))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12))
def test_groups_hold_every_row_once_and_little_padding(lengths):
    found = ragged.groups(lengths)
    assert [i for group in found for i in range(len(lengths))[group.rows]] == list(range(len(lengths)))
    for group in found:
        own = lengths[group.rows]
        assert group.length == max(own) <= ragged.STRETCH * min(own) + ragged.SLACK
        x = torch.arange(float(group.tokens))[:, None] + 1.0
        padded = group.padded(x)
        assert padded.shape == (len(own), max(own), 1)
        assert (padded[..., 0] > 0).sum(dim=1).tolist() == own
        assert torch.equal(group.real(padded), x)


def test_long_rows_are_attended_to_by_the_fused_kernel_with_the_same_numbers(llama, monkeypatch):
    used = []
    for name in ("_attend_short", "_attend_long"):
        plain = getattr(blocks, name)
        monkeypatch.setattr(blocks, name, lambda *a, name=name, plain=plain: used.append(name) or plain(*a))
    for length, name in ((SHORT_SEQUENCE, "_attend_short"), (SHORT_SEQUENCE + 1, "_attend_long")):
        ids = torch.randint(0, 97, (1, length))
        found = last_hidden(llama, ids)
        assert set(used) == {name}
        used.clear()
        expected = theirs(llama, ids, monkeypatch=monkeypatch)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert_same_gradients(gradients(llama, found), gradients(llama, expected))


@pytest.mark.parametrize("kind", batches())
def test_adapters_and_their_gradients_are_those_of_separate_layers(model, kind, monkeypatch):
    active = lora.adapt(model, LoRAConfig(rank=4, alpha=8.0))
    for seed, name in enumerate(("one", "two")):
        lora.add_adapter(model, name, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    for name in ("one", "two"):
        active.name = name
        expected = theirs(model, *batches()[kind], monkeypatch=monkeypatch)
        found = last_hidden(model, *batches()[kind])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        graded = gradients(model, found)
        assert_same_gradients(graded, gradients(model, expected))
        assert all(key.endswith(name) for key in graded)
    active.name = None
    plain = last_hidden(model, *batches()[kind])
    torch.testing.assert_close(plain, theirs(model, *batches()[kind], monkeypatch=monkeypatch))
    assert not plain.requires_grad


def test_activations_computed_again_give_the_same_gradients(llama):
    ids = batches()["rows"][0]
    kept = gradients(llama, last_hidden(llama, ids))
    again = gradients(llama, blocks.last_hidden(llama, ids, None, None, recompute=True))
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_copies_in_bfloat16_follow_their_float32_weights(params, tiny_model_dir, monkeypatch):
    run = params.run.model_copy(update={"precision": "bfloat16", "device": "cpu"})
    roles = FullRoles(load_tokenizer(tiny_model_dir), params.model_copy(update={"run": run}))
    roles.add("policy", path=tiny_model_dir)
    parameters = roles.parameters("policy")
    optimizer = make_optimizer(parameters, 1e-2)
    ids = torch.randint(0, 97, (3, 11))
    for _ in range(2):
        found = roles.hidden("policy", ids, None, None)
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "applies_to", lambda model: False)
            expected = roles.hidden("policy", ids, None, None)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.1)
        before = found.detach().clone()
        found.float().sum().backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in parameters)
        step_if_finite(optimizer, 1.0)
        assert not torch.equal(roles.hidden("policy", ids, None, None), before)
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    assert not roles.hidden("policy", ids, None, None).any()


def test_a_model_whose_weights_were_stacked_is_saved_and_opened_as_before(llama, tmp_path):
    expected = {name: parameter.clone() for name, parameter in llama.named_parameters()}
    last_hidden(llama, batches()["rows"][0])
    q, k = llama.model.layers[0].self_attn.q_proj, llama.model.layers[0].self_attn.k_proj
    assert q.weight.untyped_storage().data_ptr() == k.weight.untyped_storage().data_ptr()
    llama.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, parameter in opened.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=97, n_embd=48, n_layer=2, n_head=4),
        LlamaConfig(**SHAPE, hidden_act="gelu"),
        MistralConfig(**SHAPE, sliding_window=8),
        LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
    ],
    ids=["gpt2", "gelu", "sliding window", "rotation that changes with the length"],
)
def test_other_models_are_left_to_transformers(config):
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not blocks.applies_to(model)
    ids = torch.randint(0, 97, (2, 12))
    expected = model.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(last_hidden(model, ids), expected, rtol=1e-4, atol=1e-5)


def test_a_model_in_training_mode_is_left_to_transformers_which_knows_dropout(llama):
    assert blocks.applies_to(llama)
    assert not blocks.applies_to(llama.train())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_packed_product_is_the_plain_one(dtype, rows, adapted):
    if not products.can_pack(dtype):
        pytest.skip(f"this torch packs no {dtype} weights")
    model = make(CONFIGS["qwen2"], dtype)
    if adapted:
        lora.adapt(model, LoRAConfig(rank=4, alpha=8.0)).name = "one"
        lora.add_adapter(model, "one", 0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
    block = Block.of(model.base_model.layers[0], dtype)
    assert isinstance(block.qkv, Product)
    x = torch.randn(rows, 48).to(dtype)
    with torch.inference_mode():
        for product in (block.qkv, block.out, block.gate_up):
            tolerance = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
            torch.testing.assert_close(PackedProduct(product, rows)(x), product(x), **tolerance)


@pytest.mark.parametrize(("packs", "fused_keys"), [(True, 10**6), (True, 0), (False, 10**6)])
@torch.inference_mode()
def test_rows_one_token_at_a_time_have_the_logits_of_whole_rows(model, packs, fused_keys, monkeypatch):
    """Ragged prompts, some in two copies; one row leaves, another takes its slot, the rest go on alone."""
    monkeypatch.setattr(products, "can_pack", lambda dtype: packs)
    monkeypatch.setattr(running, "FUSED_KEYS", fused_keys)
    generator = torch.Generator().manual_seed(3)
    texts = [list(prompt) for prompt in (PROMPTS[0], PROMPTS[3]) for _ in range(2)]

    def check(logits, rows):
        for row, slot in rows.items():
            expected = model(torch.tensor([texts[row]])).logits[0, -1]
            torch.testing.assert_close(logits[slot], expected, rtol=1e-3, atol=1e-4)

    rows = StaticRows(model, slots=4, longest=40)
    logits = rows.enter(range(4), [texts[0], texts[2]], copies=2)
    held = {0: 0, 1: 1, 2: 2, 3: 3}  # text -> slot
    check(logits, held)

    def step(count):
        for _ in range(count):
            tokens = [0] * len(held)
            for text, slot in held.items():
                tokens[slot] = int(torch.randint(0, 97, (), generator=generator))
                texts[text].append(tokens[slot])
            check(rows.step(torch.tensor(tokens)), held)

    step(3)
    rows.leave([1])
    texts.append(list(PROMPTS[2]))
    held = {0: 0, 4: 1, 2: 2, 3: 3}
    check(rows.enter([1], [texts[4]], copies=1)[None, 0].expand(2, -1), {4: 1})
    step(3)
    rows.leave([0, 2])
    rows.keep(torch.tensor([1, 3]))
    held = {4: 0, 3: 1}
    step(3)


@torch.inference_mode()
def test_own_rows_and_those_of_transformers_give_the_same_logits(model):
    own, other = StaticRows(model, slots=6, longest=30), CachedRows(model)
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[3]]
    torch.testing.assert_close(
        own.enter(range(6), prompts, 2), other.enter(range(6), prompts, 2), rtol=1e-3, atol=1e-4
    )
    for number in range(6):
        tokens = torch.randint(0, 97, (6 if number < 3 else 3,))
        torch.testing.assert_close(own.step(tokens), other.step(tokens), rtol=1e-3, atol=1e-4)
        if number == 2:
            own.keep(torch.tensor([0, 3, 5]))
            other.keep(torch.tensor([0, 3, 5]))


def test_what_stood_in_unused_memory_is_never_read(llama, monkeypatch):
    """Room for keys and values is not cleared before it is needed; NaN in it must not come through."""
    plain = torch.empty

    def dirty(*shape, **named):
        found = plain(*shape, **named)
        return found.fill_(torch.nan) if found.ndim == 5 else found

    monkeypatch.setattr(torch, "empty", dirty)
    with torch.inference_mode():
        rows = StaticRows(llama, slots=3, longest=30)
        logits = rows.enter([0, 2], [PROMPTS[0], PROMPTS[3]], 1)
        assert logits.isfinite().all()
        for _ in range(5):
            logits = rows.step(torch.tensor([1, 2, 3]))
            assert logits.isfinite().all()


def test_the_tiny_model_of_the_tests_is_computed_here(tiny_model_dir):
    run = RunConfig(seed=0, device="cpu", num_processes=1, sharding="none", precision="float32")
    assert blocks.applies_to(load_policy(tiny_model_dir, run)[0])
