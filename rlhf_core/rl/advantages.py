"""Per-token rewards and generalised advantage estimation."""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, *, kl_coef: float
) -> Tensor:
    """Reward of each response token (Ziegler et al. 2019, eq. 2): a KL price, and the score at the end.

        r_t = -kl_coef * (logprobs_t - ref_logprobs_t) + [t is the last response token] * score

    scores (B,); logprobs, ref_logprobs (B, R); response_mask (B, R) bool, True on response tokens.
    Returns (B, R), zero outside the mask.
    """
    rewards = (-kl_coef * (logprobs - ref_logprobs)).masked_fill(~response_mask, 0.0)
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
