import pytest
import torch

from rlhf_core.generation import Generation
from rlhf_core.rl.rewards import reward_parts

ANSWERS = [
    Generation(token_ids=(5, 6, 7), text="one two three", finished=True),
    Generation(token_ids=(5, 6, 7, 8), text="a b c d a b c d", finished=False),
]
CHATS = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "yo"}]]


class Scorer:
    def score(self, conversations, responses):
        return [1.0, 2.0]


class Function:
    def score(self, prompts, responses):
        assert list(prompts) == ["hi", "yo"]
        return [float(len(text)) for text in responses]


def parts(config, function=None, **changes):
    off = {"missing_eos_penalty": 0.0, "length_penalty": 0.0, "repetition_penalty": 0.0}
    return reward_parts(Scorer(), function, config.model_copy(update=off | changes), CHATS, ANSWERS)


@pytest.fixture
def config(params):
    return params.ppo


def test_what_is_off_is_absent(config):
    assert list(parts(config)) == ["reward_model"]


def test_each_part_by_hand(config):
    found = parts(config, Function(), missing_eos_penalty=2.0, length_penalty=0.5, repetition_penalty=10.0)
    expected = {
        "reward_model": [1.0, 2.0],
        "function": [13.0, 15.0],
        "missing_eos": [0.0, -2.0],
        "length": [-1.5, -2.0],
        "repetition": [0.0, -2.0],  # 1 of 5 word 4-grams stood there before
    }
    assert {name: part.tolist() for name, part in found.items()} == {
        name: pytest.approx(values) for name, values in expected.items()
    }
    assert all(part.dtype == torch.float32 for part in found.values())
