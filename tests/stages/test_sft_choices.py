"""What SFT learns from: whole conversations, packed rows, noisy embeddings."""

from __future__ import annotations

import pytest
import torch

from rlhf_core.config import RunConfig
from rlhf_core.errors import InputError
from rlhf_core.modeling.encoding import CHATML, PLAIN_TEMPLATE, encode_prompt, encode_response, encode_turns
from rlhf_core.modeling.loading import load_policy, load_tokenizer
from rlhf_core.modeling.roles import open_roles
from rlhf_core.stages.sft import CompletionTask, encode_example, noisy_embeddings

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi, how are you?"},
    {"role": "user", "content": "fine, and you?"},
    {"role": "assistant", "content": "i am well."},
]
FORGETFUL = (  # as of models that cut their reasoning out of earlier turns
    "{% for m in messages %}{{ m['role'] + ': ' + (m['content'] if loop.last else '...') + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_model_dir):
    return load_tokenizer(tiny_model_dir)


@pytest.mark.parametrize("template", [CHATML, PLAIN_TEMPLATE])
def test_answers_are_told_apart_without_generation_marks(tokenizer, template):
    tokenizer.chat_template = template
    ids, is_answer = encode_turns(tokenizer, CHAT)
    answers = [encode_response(tokenizer, CHAT[i]["content"]) for i in (2, 4)]
    learnt = [token for token, answer in zip(ids, is_answer, strict=True) if answer]
    assert learnt == answers[0] + answers[1]
    first = encode_prompt(tokenizer, CHAT[:2])
    assert ids[: len(first)] == first  # what generation sees before the first answer
    if template == CHATML:  # EOS is part of the template, so the last answer sees what generation does too
        assert tokenizer.decode(ids[: -len(answers[1])]) == tokenizer.decode(
            encode_prompt(tokenizer, CHAT[:4])
        )


def test_a_template_that_rewrites_turns_is_refused(tokenizer):
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(InputError, match="writes earlier turns anew"):
        encode_turns(tokenizer, CHAT)


def test_one_turn_is_learnt_the_same_either_way(tokenizer):
    row = {"messages": CHAT[:2], "response": CHAT[2]["content"]}
    assert encode_example(tokenizer, row, "assistant") == encode_example(tokenizer, row, "response")


def test_earlier_answers_are_learnt_on_request(tokenizer):
    row = {"messages": CHAT[:4], "response": CHAT[4]["content"]}
    counts = {
        how: sum(encode_example(tokenizer, row, how).targets) for how in ("response", "assistant", "all")
    }
    assert 0 < counts["response"] < counts["assistant"] < counts["all"]


ROWS = [{"messages": CHAT[:n], "response": CHAT[4]["content"] * n} for n in (2, 4, 1)] + [
    {"messages": CHAT[1:2], "response": text} for text in ("no", "rain or sun", "good day")
]


def make_task(params, directory, **changes):
    config = params.sft.model_copy(update={"max_length": 400, **changes})
    roles = open_roles(params, directory, trained=["policy"], seed=0)
    rows = [encode_example(roles.tokenizer, row, config.loss_on) for row in ROWS]
    return CompletionTask(roles, rows, config, seed=0), rows


@pytest.mark.parametrize("loss_on", ["response", "assistant", "all"])
def test_packed_rows_have_the_loss_and_gradients_of_rows_apart(small_params, tiny_model_dir, loss_on):
    found = []
    for packing in (False, True):
        task, rows = make_task(small_params, tiny_model_dir, packing=packing, loss_on=loss_on)
        loss, stats = task.loss(rows)
        loss.backward()
        gradients = [p.grad for p in task.roles.parameters("policy")]
        found.append([loss, stats["train/token_accuracy"], *gradients])
    for apart, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-5)


def test_loss_equals_the_definition_turn_by_turn(small_params, tiny_model_dir):
    task, rows = make_task(small_params, tiny_model_dir, loss_on="assistant")
    model, _ = load_policy(
        tiny_model_dir,
        RunConfig(seed=0, device="cpu", num_processes=1, sharding="none", precision="float32"),
    )
    expected = 0.0
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.response]])
        logprobs = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
        for t, learnt in enumerate(row.targets):
            position = len(row.prompt) + t
            expected -= learnt * logprobs[position - 1, ids[0, position]].item()
    assert task.loss(rows)[0].item() == pytest.approx(expected, rel=1e-4)
    assert task.weight(rows) == sum(sum(row.targets) for row in rows)


def test_noise_is_in_training_only_repeats_by_step_and_scales(small_params, tiny_model_dir):
    plain, rows = make_task(small_params, tiny_model_dir)
    noisy, _ = make_task(small_params, tiny_model_dir, neftune_alpha=50.0)

    def loss_at(step):
        noisy.start_step(step)
        return noisy.loss(rows)[0].item()

    first = loss_at(3)
    assert first != plain.loss(rows)[0].item()
    assert loss_at(4) != first
    assert loss_at(3) == first
    assert noisy.evaluate() == plain.evaluate()


def test_noise_has_the_size_of_the_paper(small_params, tiny_model_dir):
    """Its root mean square is alpha / sqrt(3 T D), and its norm at most alpha."""
    task, _ = make_task(small_params, tiny_model_dir, neftune_alpha=5.0)
    ids = torch.arange(3, 43)[None]
    with task.roles.using("policy") as model:
        embed = model.get_input_embeddings()
        clean = embed(ids)
        with noisy_embeddings(model, 5.0, task.noise):
            noise = embed(ids) - clean
        assert torch.equal(embed(ids), clean)
    size = clean.shape[1] * clean.shape[2]
    assert noise.norm().item() <= 5.0
    assert noise.pow(2).mean().sqrt().item() == pytest.approx(5.0 / (3 * size) ** 0.5, rel=0.05)
