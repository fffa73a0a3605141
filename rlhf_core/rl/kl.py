"""Divergence from the reference: estimators from samples, and a coefficient that steers towards a target."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ERROR_CLIP = 0.2  # Ziegler et al. 2019, section 2.2


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """KL(policy || reference) of each token, estimated from tokens that the policy sampled (Schulman 2020,
    "Approximating KL divergence"). With log r = logprobs - ref_logprobs:

        k1 = log r                    unbiased; single values may be negative
        k2 = (log r)^2 / 2            biased, never negative; its gradient is that of the KL
        k3 = exp(-log r) - 1 + log r  unbiased and never negative

    Any shape; nats.
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    if estimator == "k3":
        return torch.exp(-log_ratio) - 1.0 + log_ratio
    raise ValueError(f"estimator {estimator!r} must be k1, k2 or k3")


@dataclass
class KLController:
    """The price of a nat of KL. With a target it adapts (Ziegler et al. 2019, eq. 4), else it stays.

    error = clip(kl / target - 1, -0.2, 0.2);  coef <- coef * (1 + error * episodes / horizon)
    """

    coef: float
    target: float = 0.0  # nats per sequence; 0 keeps `coef` as it is
    horizon: float = 1.0  # episodes

    def update(self, kl: float, episodes: int) -> None:
        """Take note of a rollout of `episodes` whose mean KL per sequence was `kl`."""
        if self.target > 0.0:
            error = min(ERROR_CLIP, max(-ERROR_CLIP, kl / self.target - 1.0))
            self.coef *= 1.0 + error * episodes / self.horizon
