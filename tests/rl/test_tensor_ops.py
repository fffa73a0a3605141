import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.rl.tensor_ops import masked_mean, masked_sum, masked_var, whiten

MASK = torch.tensor([[True, True, False], [True, False, False]])
VALUES = torch.tensor([[1.0, 2.0, torch.nan], [6.0, torch.inf, -50.0]])


def test_masked_reductions_by_hand():
    assert masked_sum(VALUES, MASK).item() == 9.0
    assert masked_mean(VALUES, MASK).item() == 3.0
    assert masked_var(VALUES, MASK).item() == pytest.approx((4 + 1 + 9) / 3)


@settings(max_examples=50, deadline=None)
@given(shift=st.floats(-100, 100), scale=st.floats(0.1, 100), seed=st.integers(0, 100))
def test_whitened_values_have_mean_zero_and_variance_one(shift, scale, seed):
    values = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 3, 2, 4])[:, None]
    white = whiten(values * scale + shift, mask)
    assert abs(white[mask].mean().item()) < 1e-9
    assert abs(white[mask].var(unbiased=False).item() - 1) < 1e-5
    assert not white[~mask].any()
    torch.testing.assert_close(white, whiten(values, mask), rtol=1e-4, atol=1e-4)


def test_whitening_that_keeps_the_mean_by_hand():
    white = whiten(VALUES, MASK, shift_mean=False)  # mean 3, variance 14 / 3
    scale = (3 / 14) ** 0.5
    expected = torch.tensor([[3 - 2 * scale, 3 - scale, 0.0], [3 + 3 * scale, 0.0, 0.0]])
    torch.testing.assert_close(white, expected)
