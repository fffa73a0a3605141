"""AdamW with its moments split over two real processes, held to torch's AdamW on the summed gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rlhf_core.errors import InputError
from rlhf_core.modeling.zero import ZeroAdamW
from rlhf_core.optim import held_moments, make_optimizer, step_if_finite

from ..two_processes import in_two_processes

STEPS = 6
RATES = [0.1, 0.05, 0.1, 0.02, 0.01, 0.1]
BAD = 3  # the step whose gradient is not a number


def make_parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7,), (1,), (2, 2, 2)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(step, rank):
    generator = torch.Generator().manual_seed(10 * step + rank)
    found = [torch.randn(p.shape, generator=generator) for p in make_parameters()]
    if step == BAD and rank == 1:
        found[1][2] = math.nan
    return found


def train(rank, resume_at):
    """Six steps with moments split, the second half by another optimizer when `resume_at` is 3."""
    parameters = make_parameters()
    optimizer = ZeroAdamW(parameters, 0.1, eps=1e-5)
    norms = []
    for step in range(STEPS):
        if step == resume_at:
            state = optimizer.state_dict()
            parameters = [nn.Parameter(p.detach().clone()) for p in parameters]
            optimizer = ZeroAdamW(parameters, 0.1, eps=1e-5)
            optimizer.load_state_dict(state)
        for parameter, gradient in zip(parameters, gradients(step, rank), strict=True):
            if (step, rank) != (1, 1):  # a rank that had no pass
                parameter.grad = gradient
        optimizer.param_groups[0]["lr"] = RATES[step]
        norms.append(step_if_finite(optimizer, 1.5))
        assert all(parameter.grad is None for parameter in parameters)
    moments = [
        value.tolist() for state in optimizer.state_dict()["state"].values() for value in state.values()
    ]
    return norms, [p.tolist() for p in parameters], moments, held_moments(optimizer)


def _without_a_break(rank):
    return train(rank, resume_at=-1)


def _with_a_break(rank):
    return train(rank, resume_at=3)


@pytest.fixture(scope="module")
def one_process():
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, 0.1, eps=1e-5)
    norms = []
    for step in range(STEPS):
        summed = zip(gradients(step, 0), gradients(step, 1), strict=True)
        for parameter, (a, b) in zip(parameters, summed, strict=True):
            parameter.grad = a if step == 1 else a + b
        optimizer.param_groups[0]["lr"] = RATES[step]
        norms.append(step_if_finite(optimizer, 1.5))
    return norms, parameters, optimizer.state_dict()["state"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("work", [_without_a_break, _with_a_break])
def test_it_takes_the_steps_of_one_process(one_process, work, deepspeed):
    """Also clipped, without a pass on one rank, skipped for a gradient that is not a number, and resumed."""
    expected_norms, expected, expected_state = one_process
    assert [taken for _, taken in expected_norms] == [step != BAD for step in range(STEPS)]
    first, second = in_two_processes(work)
    for norms, parameters, moments, held in (first, second):
        assert [taken for _, taken in norms] == [taken for _, taken in expected_norms]
        good = [i for i in range(STEPS) if i != BAD]
        assert [norms[i][0] for i in good] == pytest.approx([expected_norms[i][0] for i in good], rel=1e-5)
        for found, parameter in zip(parameters, expected, strict=True):
            torch.testing.assert_close(torch.tensor(found), parameter.detach(), rtol=1e-5, atol=1e-6)
        flat = [
            state[name] for state in expected_state.values() for name in ("exp_avg", "exp_avg_sq", "step")
        ]
        for value, wanted in zip(moments, flat, strict=True):
            torch.testing.assert_close(torch.tensor(value), wanted, rtol=1e-5, atol=1e-6)
        assert held == pytest.approx(0.5, abs=0.1)
    assert first[1:3] == second[1:3]  # to the bit


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", None)
    with pytest.raises(InputError, match=r"pip install .*'\.\[deepspeed\]'"):
        ZeroAdamW(make_parameters(), 0.1, eps=1e-8)
