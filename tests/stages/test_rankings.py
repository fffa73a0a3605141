"""Pairs of one prompt together in the reward model's task."""

import pytest
import torch

from rlhf_core.modeling.pairs import Pair, rankings
from rlhf_core.modeling.reward import ScalarHead
from rlhf_core.modeling.roles import open_roles
from rlhf_core.rl.losses import pairwise_loss
from rlhf_core.stages import reward
from rlhf_core.stages.reward import PairwiseTask

PROMPT, OTHER = list(range(10, 22)), [5, 6, 7]
A, B, C = [30, 31, 2], [32, 2], [33, 34, 35, 2]


def pair(prompt, chosen, rejected):
    return Pair(prompt, chosen, rejected, margin=0.0, group=str(prompt), source="ai:unit")


PAIRS = [pair(PROMPT, A, B), pair(OTHER, A, C), pair(PROMPT, A, C), pair(PROMPT, B, C)]


@pytest.fixture
def task(small_params, tiny_model_dir):
    roles = open_roles(small_params, tiny_model_dir, trained=["reward"], seed=0)
    with roles.using("reward") as model:
        head = ScalarHead(model.config.hidden_size, seed=0)
    return PairwiseTask(roles, [head], [], small_params.reward)


def test_pairs_of_a_prompt_stay_together_in_order():
    assert rankings(PAIRS) == [(PAIRS[0], PAIRS[2], PAIRS[3]), (PAIRS[1],)]


def test_every_prompt_counts_one(task):
    rows = rankings(PAIRS)
    loss, stats = task.loss(rows)
    parts = []
    for row in rows:
        (chosen,), (rejected,) = task.scores(row)
        parts.append(-torch.nn.functional.logsigmoid(chosen - rejected).mean())
    assert task.weight(rows) == 2
    torch.testing.assert_close(loss, sum(parts), rtol=1e-5, atol=1e-6)
    assert 0 <= stats["train/accuracy"] <= 2


def test_each_answer_is_scored_once(task, monkeypatch):
    laid_out = []
    make_batch = reward.make_batch
    monkeypatch.setattr(
        reward, "make_batch", lambda *args: laid_out.append(make_batch(*args)) or laid_out[-1]
    )
    task.scores(PAIRS)
    ids = laid_out[0].input_ids
    assert ids.tolist() == [[*OTHER, *A, *[0] * 15], [*OTHER, *C, *[0] * 14], [*PROMPT, *A, *B, *C]]


def test_scores_and_gradients_are_those_of_pairs_alone(task):
    def gradients(groups):
        for parameter in task.roles.parameters("reward"):
            parameter.grad = None
        losses = [pairwise_loss(*task.scores(group))[0] for group in groups]
        torch.stack(losses).sum().backward()
        return [p.grad.clone() for p in task.roles.parameters("reward") if p.grad is not None]

    together, apart = gradients([PAIRS]), gradients([[p] for p in PAIRS])
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_all_scores_come_in_the_order_asked(task):
    (chosen,), (rejected,) = task.all_scores(PAIRS)
    for i, row in enumerate(PAIRS):
        alone = torch.cat(task.all_scores([row])).flatten()
        torch.testing.assert_close(torch.stack([chosen[i], rejected[i]]), alone, rtol=1e-4, atol=1e-5)
