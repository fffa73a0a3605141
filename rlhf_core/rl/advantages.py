"""Per-token rewards, and advantages: with a critic (GAE) or from samples alone (RLOO, GRPO, REINFORCE++)."""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, *, kl_coef: float) -> Tensor:
    """Reward of each response token (Ziegler et al. 2019, eq. 2): a KL price, and the score at the end.

        r_t = -kl_coef * kl_t + [t is the last response token] * score

    scores (B,); kl (B, R), an estimate for each token; response_mask (B, R) bool, True on response tokens.
    Returns (B, R), zero outside the mask.
    """
    rewards = (-kl_coef * kl).masked_fill(~response_mask, 0.0)
    last = response_mask.sum(dim=1) - 1
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) and the returns it implies.

        delta_t = r_t + gamma * V_{t+1} - V_t        (V = 0 after the last response token)
        A_t = delta_t + gamma * gae_lambda * A_{t+1}
        returns_t = A_t + V_t

    All (B, R), responses packed to the left; response_mask is bool, True on response tokens. Zero outside it.
    """
    values = values.masked_fill(~response_mask, 0.0)
    rewards = rewards.masked_fill(~response_mask, 0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * next_values - values
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * gae_lambda * running
        advantages[:, t] = running
    advantages = advantages.masked_fill(~response_mask, 0.0)
    return advantages, advantages + values


def rloo(rewards: Tensor, response_mask: Tensor, *, group_size: int) -> Tensor:
    """REINFORCE leave-one-out (Ahmadian et al. 2024, eq. 7): each sample against the others of its prompt.

        A_i = R_i - mean of R_j over the other samples j of the prompt,  R_i = sum_t r_{i,t}

    rewards, response_mask (B, R), the `group_size` samples of a prompt in adjacent rows. Every token of a
    sample has the sample's advantage; zero outside the mask.
    """
    totals = _totals(rewards, response_mask, group_size)
    others = (totals.sum(dim=1, keepdim=True) - totals) / (group_size - 1)
    return _on_tokens(totals - others, response_mask)


def grpo(rewards: Tensor, response_mask: Tensor, *, group_size: int, eps: float = 1e-4) -> Tensor:
    """Group-relative advantages (Shao et al. 2024, section 4.1): standardised among the samples of a prompt.

        A_i = (R_i - mean_j R_j) / (std_j R_j + eps),  the sample standard deviation

    Shapes as for `rloo`. A prompt whose samples all earn the same teaches nothing: its advantages are 0.
    """
    totals = _totals(rewards, response_mask, group_size)
    centred = totals - totals.mean(dim=1, keepdim=True)
    return _on_tokens(centred / (totals.std(dim=1, keepdim=True) + eps), response_mask)


def rewards_to_go(rewards: Tensor, response_mask: Tensor, *, gamma: float) -> Tensor:
    """Discounted sum of the rewards from each token on, which REINFORCE++ whitens over the batch (Hu 2025,
    section 3).

        G_t = r_t + gamma * G_{t+1}

    (B, R), responses packed to the left; zero outside the mask.
    """
    zeros = torch.zeros_like(rewards)
    return gae(rewards, zeros, response_mask, gamma=gamma, gae_lambda=1.0)[0]


def _totals(rewards: Tensor, response_mask: Tensor, group_size: int) -> Tensor:
    """Reward of each sample, (prompts, group_size)."""
    return rewards.masked_fill(~response_mask, 0.0).sum(dim=1).view(-1, group_size)


def _on_tokens(advantages: Tensor, response_mask: Tensor) -> Tensor:
    return advantages.view(-1, 1).expand(response_mask.shape).masked_fill(~response_mask, 0.0)
