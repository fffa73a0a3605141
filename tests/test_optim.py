import math

import pytest
import torch

from rlhf_core.optim import MOST_SKIPPED, DivergedError, SkipGuard, step_if_finite


@pytest.fixture
def weight():
    return torch.nn.Parameter(torch.tensor([1.0, 2.0]))


def test_step_is_taken_with_the_clipped_gradient(weight):
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.tensor([3.0, 4.0])
    assert step_if_finite(optimizer, 1.0) == (5.0, True)
    torch.testing.assert_close(weight.detach(), torch.tensor([1.0 - 0.6, 2.0 - 0.8]), rtol=1e-5, atol=1e-5)
    assert weight.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_gradient_changes_neither_weights_nor_moments(weight, bad):
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.ones(2)
    step_if_finite(optimizer, 1.0)
    before = weight.detach().clone()
    moments = optimizer.state[weight]["exp_avg"].clone()
    weight.grad = torch.tensor([bad, 1.0])
    norm, taken = step_if_finite(optimizer, 1.0)
    assert not taken
    assert not math.isfinite(norm)
    assert torch.equal(weight.detach(), before)
    assert torch.equal(optimizer.state[weight]["exp_avg"], moments)
    assert optimizer.state[weight]["step"] == 1


def test_only_a_run_of_skipped_steps_ends_training():
    guard = SkipGuard()
    for _ in range(3):
        for _ in range(MOST_SKIPPED - 1):
            guard.note(1.0, "sft, step 1")
        guard.note(0.0, "sft, step 1")
    for _ in range(MOST_SKIPPED - 1):
        guard.note(1.0, "sft, step 9")
    with pytest.raises(DivergedError, match=r"sft, step 9: 5 steps in a row .* lower the learning rate"):
        guard.note(1.0, "sft, step 9")
