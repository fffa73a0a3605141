import pytest
import torch

from rlhf_core.generation import Generation
from rlhf_core.rl.rewards import ScoreShaper, reward_parts

ANSWERS = [
    Generation(token_ids=(5, 6, 7), text="one two three", finished=True),
    Generation(token_ids=(5, 6, 7, 8), text="a b c d a b c d", finished=False),
]
CHATS = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "yo"}]]


class Scorer:
    def __init__(self, *members):
        self.members = torch.tensor(members or [[1.0, 2.0]])

    def member_scores(self, conversations, responses):
        return self.members


class Function:
    def score(self, prompts, responses):
        assert list(prompts) == ["hi", "yo"]
        return [float(len(text)) for text in responses]


def parts(config, function=None, scorer=None, **changes):
    off = {"missing_eos_penalty": 0.0, "length_penalty": 0.0, "repetition_penalty": 0.0}
    return reward_parts(scorer or Scorer(), function, config.model_copy(update=off | changes), CHATS, ANSWERS)


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


ENSEMBLE = ([1.0, 2.0], [3.0, 2.0], [5.0, -1.0])  # means 3 and 1


@pytest.mark.parametrize(
    ("how", "taken"),
    [("worst", [-2.0, -2.0]), ("uncertainty", [-0.5 * 8 / 3, -0.5 * (1 + 1 + 4) / 3])],
)
def test_doubt_of_an_ensemble_is_a_part_of_its_own(config, how, taken):
    found = parts(config, scorer=Scorer(*ENSEMBLE), ensemble=how, uncertainty_coef=0.5)
    assert found["reward_model"].tolist() == [3.0, 1.0]
    assert found["disagreement"].tolist() == pytest.approx(taken)
    assert list(parts(config, scorer=Scorer(*ENSEMBLE))) == ["reward_model"]


@pytest.mark.parametrize("how", ["worst", "uncertainty"])
def test_members_that_agree_leave_no_doubt(config, how):
    found = parts(config, scorer=Scorer([1.5, -2.0], [1.5, -2.0]), ensemble=how)
    assert found["disagreement"].tolist() == [0.0, 0.0]


def shaper(params, **changes):
    return ScoreShaper(params.ppo.model_copy(update=changes))


def test_scores_count_as_they_are_by_default(params):
    scores = torch.tensor([3.0, -40.0])
    assert torch.equal(shaper(params)(scores), scores)


def test_running_scale_is_the_deviation_of_all_scores_so_far(params):
    shape = shaper(params, score_scaling="running")
    parts = [torch.tensor([1.0, 2.0, 6.0]), torch.tensor([-3.0, 10.0]), torch.tensor([5.0])]
    for i, part in enumerate(parts):
        so_far = torch.cat(parts[: i + 1]).double()
        expected = part / so_far.std(unbiased=False)
        torch.testing.assert_close(shape(part).double(), expected.double(), rtol=1e-6, atol=1e-6)
    again = shaper(params, score_scaling="running")
    again.load(shape.state())
    assert torch.equal(again(parts[0]), shape(parts[0]))


def test_batch_scale_and_clip(params):
    shaped = shaper(params, score_scaling="batch", score_clip=1.2)(torch.tensor([0.0, 0.0, 0.0, 8.0]))
    third = -1 / 3**0.5
    torch.testing.assert_close(shaped, torch.tensor([third, third, third, 1.2]))


def test_scores_all_alike_scale_to_nothing_and_not_to_infinity(params):
    for scaling in ("running", "batch"):
        assert shaper(params, score_scaling=scaling, score_clip=5.0)(torch.ones(4)).isfinite().all()
