import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.rl.advantages import gae, grpo, rewards_to_go, rloo, token_rewards


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
        kl=torch.tensor([[0.5, -1.0, 0.0], [1.0, -14.0, -14.0]]),
        response_mask=mask,
        kl_coef=0.1,
    )
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.1, 10.0], [-0.1 - 4.0, 0.0, 0.0]]))


def test_rewards_of_an_episode_sum_to_the_score_minus_its_priced_kl():
    generator = torch.Generator().manual_seed(2)
    kl = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([6, 4, 2, 1])[:, None]
    scores = torch.randn(4, generator=generator, dtype=torch.float64)

    rewards = token_rewards(scores, kl, mask, kl_coef=0.3)

    totals = torch.stack([kl[i, : int(n)].sum() for i, n in enumerate(mask.sum(1))])
    torch.testing.assert_close(rewards.sum(1), scores - 0.3 * totals)


def episodes(prompts=3, group_size=4, width=5, seed=3):
    """Rewards and a mask with every length from 1 to `width`, and lists of each episode's own rewards."""
    generator = torch.Generator().manual_seed(seed)
    count = prompts * group_size
    rewards = torch.randn(count, width, generator=generator, dtype=torch.float64)
    lengths = [1 + i % width for i in range(count)]
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    own = [rewards[i, :n].tolist() for i, n in enumerate(lengths)]
    return rewards, mask, own


def test_rloo_by_hand():
    rewards = torch.tensor([[1.0, 0.0], [2.0, 2.0], [0.0, 9.0], [5.0, 9.0]])
    mask = torch.tensor([[True, True], [True, True], [True, False], [True, False]])
    # totals 1, 4 | 0, 5 (9 lies outside the mask)
    assert rloo(rewards, mask, group_size=2).tolist() == [[-3, -3], [3, 3], [-5, 0], [5, 0]]


def test_grpo_by_hand():
    rewards = torch.tensor([[0.0], [2.0], [4.0]])
    mask = torch.ones(3, 1, dtype=torch.bool)
    assert grpo(rewards, mask, group_size=3, eps=0.0).flatten().tolist() == [-1.0, 0.0, 1.0]


def test_rewards_to_go_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert rewards_to_go(rewards, mask, gamma=0.5).tolist() == [[3.0, 4.0, 4.0]]


@pytest.mark.parametrize("estimate", [rloo, grpo])
def test_group_advantages_equal_their_definitions(estimate):
    rewards, mask, own = episodes()
    found = estimate(rewards, mask, group_size=4)
    totals = [sum(values) for values in own]
    for i, total in enumerate(totals):
        group = totals[i - i % 4 : i - i % 4 + 4]
        if estimate is rloo:
            others = [t for j, t in enumerate(group) if j != i % 4]
            expected = total - statistics.fmean(others)
        else:
            expected = (total - statistics.fmean(group)) / (statistics.stdev(group) + 1e-4)
        assert found[i][mask[i]].tolist() == pytest.approx([expected] * len(own[i]))
    assert not found[~mask].any()


@pytest.mark.parametrize("estimate", [rloo, grpo])
def test_group_advantages_do_not_change_when_a_prompt_earns_more(estimate):
    """Only the comparison within a prompt counts: what a prompt earns by itself is no merit of an answer."""
    rewards, mask, _ = episodes()
    shifted = rewards.clone()
    shifted[4:8, 0] += 7.0
    found = estimate(shifted, mask, group_size=4)
    torch.testing.assert_close(found, estimate(rewards, mask, group_size=4))


def test_samples_that_earn_the_same_teach_nothing():
    rewards, mask = torch.ones(4, 1), torch.ones(4, 1, dtype=torch.bool)
    assert not rloo(rewards, mask, group_size=4).any()
    assert not grpo(rewards, mask, group_size=4).any()


def test_rloo_advantages_of_a_prompt_sum_to_zero_over_samples():
    rewards, mask, _ = episodes()
    sums = rloo(rewards, mask, group_size=4)[:, 0].view(3, 4).sum(dim=1)
    torch.testing.assert_close(sums, torch.zeros(3, dtype=torch.float64))
