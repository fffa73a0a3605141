import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.config import RunConfig
from rlhf_core.modeling.blocks import SHORT_SEQUENCE
from rlhf_core.modeling.encoding import SHARED_PROMPT, make_batch
from rlhf_core.modeling.loading import load_policy
from rlhf_core.modeling.logprobs import response_hidden
from rlhf_core.modeling.reward import last_response_hidden
from rlhf_core.modeling.trunk import last_hidden

CPU = torch.device("cpu")
TOKEN = st.integers(3, 60)
LONG_PROMPT = list(range(10, 10 + SHARED_PROMPT))


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_policy(
        tiny_model_dir,
        RunConfig(seed=0, device="cpu", num_processes=1, sharding="none", precision="float32"),
    )[0]


def test_one_sequence_to_a_row_needs_no_mask():
    batch = make_batch([[1, 1], [1]], [[5], [6, 7]], 0, CPU)
    assert batch.input_ids.tolist() == [[1, 1, 5], [1, 6, 7]]
    assert batch.position_ids is None
    assert batch.visible is None
    assert batch.predictors.tolist() == [1, 3, 4]
    assert batch.last.tolist() == [2, 5]


def test_equal_prompts_are_laid_out_once():
    batch = make_batch([LONG_PROMPT] * 2, [[5, 6], [7]], 0, CPU)
    assert batch.input_ids.tolist() == [[*LONG_PROMPT, 5, 6, 7]]
    assert batch.position_ids.tolist() == [[*range(8), 8, 9, 8]]
    assert batch.predictors.tolist() == [7, 8, 7]
    assert batch.last.tolist() == [9, 10]
    sees = [[i for i in range(11) if batch.visible[0, t, i]] for t in (7, 9, 10)]
    assert sees == [list(range(8)), list(range(10)), [*range(8), 10]]


def test_short_prompts_and_rows_too_long_are_not_shared():
    short = make_batch([LONG_PROMPT[1:]] * 2, [[5], [7]], 0, CPU)
    assert short.input_ids.shape == (2, 8)
    long = make_batch([LONG_PROMPT] * 4, [[5] * 100] * 4, 0, CPU)
    assert long.input_ids.shape == (2, 208)


def test_packing_fills_rows_with_the_longest_first():
    batch = make_batch([[1], [2], [3]], [[9] * 4, [9] * 6, [9] * 2], 0, CPU, row_tokens=10)
    assert batch.input_ids.tolist() == [[1, 9, 9, 9, 9, 0, 0, 0, 0, 0], [2, 9, 9, 9, 9, 9, 9, 3, 9, 9]]
    assert batch.lengths == (5, 10)


rows = st.lists(
    st.tuples(
        st.one_of(st.sampled_from([LONG_PROMPT, LONG_PROMPT[::-1]]), st.lists(TOKEN, min_size=1, max_size=9)),
        st.lists(TOKEN, min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=40, deadline=None)
@given(rows, st.sampled_from([0, 30, 300]))
def test_no_sequence_sees_another(model, rows, row_tokens):
    """States and gradients are those of each sequence alone, however the rows are laid out."""
    prompts, responses = [p for p, _ in rows], [r for _, r in rows]
    batch = make_batch(prompts, responses, 0, CPU, row_tokens=row_tokens)
    hidden = last_hidden(model, *batch.inputs)
    parts = response_hidden(hidden, batch).split([len(r) for r in responses])
    last = last_response_hidden(hidden, batch)
    for i, (prompt, response) in enumerate(rows):
        alone = model.base_model(input_ids=torch.tensor([[*prompt, *response]])).last_hidden_state[0]
        torch.testing.assert_close(parts[i], alone[len(prompt) - 1 : -1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last[i], alone[-1], rtol=1e-4, atol=1e-4)


def test_fused_attention_of_long_rows_sees_the_same(model):
    prompts = [LONG_PROMPT] * 3
    responses = [[5] * 90, [6] * 90, [7] * 80]
    short = make_batch(prompts, responses, 0, CPU)
    long = make_batch(prompts, responses, 0, CPU, row_tokens=500)  # the two rows in one
    assert short.input_ids.shape[1] <= SHORT_SEQUENCE < long.input_ids.shape[1]
    expected = response_hidden(last_hidden(model, *short.inputs), short)
    found = response_hidden(last_hidden(model, *long.inputs), long)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_shared_prompt_add_up(tiny_model_dir):
    model = load_policy(
        tiny_model_dir,
        RunConfig(seed=0, device="cpu", num_processes=1, sharding="none", precision="float32"),
    )[0]
    weight = model.base_model.layers[0].mlp.up_proj.weight
    prompts, responses = [LONG_PROMPT] * 3, [[5, 6], [7], [8, 9, 10]]

    def gradient(batches):
        weight.grad = None
        for batch in batches:
            (response_hidden(last_hidden(model, *batch.inputs), batch) ** 3).sum().backward()
        return weight.grad.clone()

    together = gradient([make_batch(prompts, responses, 0, CPU)])
    apart = gradient([make_batch([p], [r], 0, CPU) for p, r in zip(prompts, responses)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
