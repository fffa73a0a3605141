import pytest
import torch

from rlhf_core.config import RunConfig
from rlhf_core.modeling import logprobs as logprobs_module
from rlhf_core.modeling.encoding import make_batch
from rlhf_core.modeling.loading import load_policy
from rlhf_core.modeling.logprobs import response_hidden, response_logprobs, scatter_to_mask, token_logprobs

RUN = RunConfig(seed=0, device="cpu", num_processes=1, sharding="none", precision="float32")
PROMPTS = [[5, 9, 3], [8, 2, 6, 1, 4, 12, 40], [7]]
RESPONSES = [[11, 20, 2], [30], [9, 9, 9, 9, 2]]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_policy(tiny_model_dir, RUN)[0]


def slow_logprobs(model, prompt, response, temperature):
    """One token at a time, no batch, no padding, float64 softmax."""
    found = []
    for t, token in enumerate(response):
        logits = (
            model(input_ids=torch.tensor([[*prompt, *response[:t]]])).logits[0, -1].double() / temperature
        )
        found.append(torch.log_softmax(logits, -1)[token].item())
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_response_logprobs_equal_the_token_by_token_definition(model, batch_size, temperature):
    found = response_logprobs(model, PROMPTS, RESPONSES, temperature=temperature, batch_size=batch_size)
    for prompt, response, logprobs in zip(PROMPTS, RESPONSES, found):
        expected = torch.tensor(slow_logprobs(model, prompt, response, temperature))
        torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-4)


def test_response_hidden_picks_the_position_before_each_response_token():
    batch = make_batch([[1, 1], [1]], [[5], [6, 7]], pad_token_id=0, device=torch.device("cpu"))
    hidden = torch.arange(2 * 3, dtype=torch.float32).reshape(2, 3, 1)  # value = 3 * row + position
    assert response_hidden(hidden, batch).flatten().tolist() == [1.0, 3.0, 4.0]
    assert batch.input_ids.tolist() == [[1, 1, 5], [1, 6, 7]]
    assert batch.response_mask.tolist() == [[True, False], [True, True]]
    assert batch.num_tokens == 3


def test_entropy_of_a_uniform_distribution_is_log_v():
    logprobs, entropy = token_logprobs(torch.zeros(2, 8), torch.tensor([0, 7]), temperature=0.7)
    torch.testing.assert_close(entropy, torch.full((2,), 8.0).log())
    torch.testing.assert_close(logprobs, -torch.full((2,), 8.0).log())


def plain_logprobs(logits, tokens, temperature):
    return torch.log_softmax(logits.float() / temperature, dim=-1).gather(-1, tokens[:, None]).squeeze(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 40, 2**19])  # logits: one row at a time, two, all
def test_logprobs_in_pieces_have_the_gradient_of_the_plain_definition(dtype, temperature, chunk, monkeypatch):
    monkeypatch.setattr(logprobs_module, "CHUNK", chunk)
    torch.manual_seed(0)
    before = (3 * torch.randn(7, 20)).to(dtype)
    before[0, 3] = 40.0  # nearly sure: 1 - p must not be lost
    tokens, weights = torch.tensor([3, 0, 19, 4, 4, 4, 7]), torch.randn(7)
    found, expected = before.clone().requires_grad_(), before.clone().requires_grad_()
    logprobs, _ = token_logprobs(found, tokens, temperature)
    plain = plain_logprobs(expected, tokens, temperature)
    torch.testing.assert_close(logprobs, plain)
    (weights * logprobs).sum().backward()
    (weights * plain).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)
    assert torch.equal(found.detach(), before)


def test_a_gpu_takes_pieces_that_bound_its_memory():
    logits = torch.empty(5000, 150_000, device="meta")
    pieces = logprobs_module._slices(logits)
    assert [row for part in pieces for row in range(*part.indices(5000))] == list(range(5000))
    assert max(part.stop - part.start for part in pieces) * 150_000 * 4 <= 2**29


def test_scatter_to_mask_puts_values_in_row_order():
    mask = torch.tensor([[True, False], [True, True]])
    assert scatter_to_mask(torch.tensor([1.0, 2.0, 3.0]), mask).tolist() == [[1.0, 0.0], [2.0, 3.0]]
