import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.config import RunConfig, SamplingConfig
from rlhf_core.generation import draw, filter_logits, generate, stream
from rlhf_core.modeling import blocks
from rlhf_core.modeling.encoding import encode_prompt
from rlhf_core.modeling.loading import load_policy

RUN = RunConfig(seed=0, device="cpu", num_processes=1, sharding="none", precision="float32")
CHATS = [
    [{"role": "user", "content": text}] for text in ("hello", "how are you today my friend?", "no", "rain")
]


def sampling(**changes):
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 12, "seed": 5}
    return SamplingConfig(**values | changes)


@pytest.fixture(scope="module")
def loaded(tiny_model_dir):
    return load_policy(tiny_model_dir, RUN)


def texts(groups):
    return [[answer.token_ids for answer in group] for group in groups]


def test_same_seed_same_texts_whatever_the_batch_size(loaded):
    model, tokenizer = loaded
    whole = generate(model, tokenizer, CHATS, sampling(), samples_per_prompt=3, batch_size=64)
    for size in (1, 3, 7):
        assert texts(
            generate(model, tokenizer, CHATS, sampling(), samples_per_prompt=3, batch_size=size)
        ) == texts(whole)
    assert texts(generate(model, tokenizer, CHATS, sampling(seed=6), samples_per_prompt=3)) != texts(whole)


def test_nearly_greedy_sampling_equals_transformers_greedy(loaded):
    model, tokenizer = loaded
    found = generate(model, tokenizer, CHATS, sampling(top_k=1), batch_size=4)
    for messages, group in zip(CHATS, found):
        prompt = torch.tensor([encode_prompt(tokenizer, messages)])
        expected = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12
        )[0, prompt.shape[1] :].tolist()
        assert list(group[0].token_ids) == expected


def test_answers_end_at_eos_or_at_the_maximum(loaded):
    model, tokenizer = loaded
    groups = generate(model, tokenizer, CHATS * 4, sampling(max_new_tokens=200), samples_per_prompt=4)
    answers = [answer for group in groups for answer in group]
    assert any(answer.finished for answer in answers)
    for answer in answers:
        assert tokenizer.eos_token_id not in answer.token_ids[:-1]
        assert answer.finished == (answer.token_ids[-1] == tokenizer.eos_token_id)
        assert answer.finished or len(answer.token_ids) == 200


def test_stream_gives_the_text_of_generate(loaded):
    model, tokenizer = loaded
    for messages in CHATS:
        (answer,) = generate(model, tokenizer, [messages], sampling(max_new_tokens=30))[0]
        streamed = "".join(stream(model, tokenizer, messages, sampling(max_new_tokens=30)))
        assert streamed.strip("\ufffd ") == answer.text.strip("\ufffd ") or streamed.strip() in answer.text


def test_draw_follows_the_distribution():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(20_000, 4)
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(draw(logits, uniforms, sampling())[0], minlength=4) / 20_000
    # 5 standard errors of the largest share: 5 * sqrt(.25 / 20000)
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.25, 0.125, 0.125]), atol=0.018, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    uniform=st.floats(0, 0.999999),
    top_k=st.integers(0, 6),
    top_p=st.floats(0.05, 1.0),
    seed=st.integers(0, 50),
)
def test_draw_takes_only_tokens_that_the_filters_keep(uniform, top_k, top_p, seed):
    logits = 3 * torch.randn(1, 6, generator=torch.Generator().manual_seed(seed))
    config = sampling(top_k=top_k, top_p=top_p)
    token = int(draw(logits, torch.tensor([uniform]), config)[0])
    kept = torch.isfinite(filter_logits(logits, config))[0]
    assert kept[token]
    assert kept[logits.argmax()]
    if top_k:
        assert kept.sum() <= top_k


def test_top_p_keeps_the_smallest_set_that_holds_the_mass():
    logits = torch.tensor([[0.1, 0.6, 0.3]]).log()
    assert torch.isfinite(filter_logits(logits, sampling(top_p=0.6))).tolist() == [[False, True, False]]
    assert torch.isfinite(filter_logits(logits, sampling(top_p=0.7))).tolist() == [[False, True, True]]


def test_temperature_divides_the_logits():
    torch.testing.assert_close(
        filter_logits(torch.tensor([[1.0, 2.0]]), sampling(temperature=0.5)), torch.tensor([[2.0, 4.0]])
    )


@pytest.mark.parametrize(("prompts", "at_once"), [(12, 3), (7, 3), (31, 16), (5, 64)])
def test_own_blocks_and_those_of_transformers_write_the_same_texts(loaded, monkeypatch, prompts, at_once):
    """More prompts than slots: freed ones are given away where rows can join; last rounds are not full."""
    model, tokenizer = loaded
    chats, found = (CHATS * 8)[:prompts], {}
    for own in (True, False):
        with monkeypatch.context() as patch:
            if not own:
                patch.setattr(blocks, "applies_to", lambda model: False)
            found[own] = generate(
                model, tokenizer, chats, sampling(), samples_per_prompt=2, batch_size=2 * at_once
            )
    assert texts(found[True]) == texts(found[False])
    for own, other in zip(found[True], found[False], strict=True):
        for one, two in zip(own, other, strict=True):
            assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)


def test_no_prompt_has_no_answers(loaded):
    model, tokenizer = loaded
    assert generate(model, tokenizer, [], sampling()) == []
    assert generate(model, tokenizer, CHATS, sampling(), only=[]) == []
