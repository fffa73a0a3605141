import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.rl.advantages import gae, token_rewards


def discounted_td_sum(rewards, values, t, gamma, gae_lambda):
    """Equation 16 of Schulman et al. 2016, written out."""
    deltas = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, [*values[1:], 0.0])]
    return sum((gamma * gae_lambda) ** k * delta for k, delta in enumerate(deltas[t:]))


def test_gae_equals_the_discounted_sum_of_td_errors():
    gamma, gae_lambda, lengths = 0.9, 0.8, [5, 3, 1]
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    response_mask = torch.arange(5) < torch.tensor(lengths)[:, None]

    advantages, returns = gae(rewards, values, response_mask, gamma=gamma, gae_lambda=gae_lambda)

    for row, length in enumerate(lengths):
        r, v = rewards[row, :length].tolist(), values[row, :length].tolist()
        expected = [discounted_td_sum(r, v, t, gamma, gae_lambda) for t in range(length)]
        torch.testing.assert_close(advantages[row, :length].tolist(), expected)
        torch.testing.assert_close(
            returns[row, :length], advantages[row, :length] + values[row, :length], rtol=0, atol=0
        )
    assert not advantages[~response_mask].any()
    assert not returns[~response_mask].any()


def test_gae_by_hand():
    # deltas: 1 + .5*4 - 2 = 1 and 3 - 4 = -1; A_1 = -1, A_0 = 1 + .5*.5*(-1) = .75
    advantages, returns = gae(
        torch.tensor([[1.0, 3.0]]),
        torch.tensor([[2.0, 4.0]]),
        torch.tensor([[True, True]]),
        gamma=0.5,
        gae_lambda=0.5,
    )
    assert advantages.tolist() == [[0.75, -1.0]]
    assert returns.tolist() == [[2.75, 3.0]]


@settings(max_examples=30, deadline=None)
@given(padding=st.integers(0, 5), junk=st.floats(-1e6, 1e6))
def test_gae_does_not_see_padding(padding, junk):
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 2, 4, generator=generator, dtype=torch.float64)
    mask = torch.ones(2, 4, dtype=torch.bool)
    plain, _ = gae(rewards, values, mask, gamma=0.97, gae_lambda=0.9)

    fill = torch.full((2, padding), junk, dtype=torch.float64)
    longer_mask = torch.cat([mask, torch.zeros(2, padding, dtype=torch.bool)], dim=1)
    padded, _ = gae(
        torch.cat([rewards, fill], 1), torch.cat([values, fill], 1), longer_mask, gamma=0.97, gae_lambda=0.9
    )

    torch.testing.assert_close(padded[:, :4], plain, rtol=0, atol=0)


def test_token_rewards_put_the_score_on_the_last_response_token():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards = token_rewards(
        scores=torch.tensor([10.0, -4.0]),
        logprobs=torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -9.0, -9.0]]),
        ref_logprobs=torch.tensor([[-1.5, -1.0, -3.0], [-2.0, 5.0, 5.0]]),
        response_mask=mask,
        kl_coef=0.1,
    )
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.1, 10.0], [-0.1 - 4.0, 0.0, 0.0]]))


def test_rewards_of_an_episode_sum_to_the_score_minus_its_priced_kl():
    generator = torch.Generator().manual_seed(2)
    logprobs, ref_logprobs = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([6, 4, 2, 1])[:, None]
    scores = torch.randn(4, generator=generator, dtype=torch.float64)

    rewards = token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=0.3)

    kl = torch.stack([(logprobs - ref_logprobs)[i, : int(n)].sum() for i, n in enumerate(mask.sum(1))])
    torch.testing.assert_close(rewards.sum(1), scores - 0.3 * kl)
