"""The losses, each a sum over what counts: the caller divides once by the count of the whole optimizer
step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_core.rl.tensor_ops import masked_sum


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    cliprange_low: float,
    cliprange_high: float,
    dual_clip: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped PPO surrogate (Schulman et al. 2017, eq. 7), summed over response tokens.

        L = -sum_t m_t * min(r_t * A_t, clip(r_t, 1 - low, 1 + high) * A_t)
        r_t = exp(logprobs_t - old_logprobs_t)

    A wider upper range lets unlikely tokens rise (Yu et al. 2025, "clip-higher"). With `dual_clip` c > 1 the
    inner minimum is at least c * A_t where A_t < 0 (Ye et al. 2020, eq. 5): a token that has become far more
    likely than it was cannot dominate the step.

    A sum, not a mean: the caller divides by the token count of the whole optimizer step,
    so the gradient does not depend on how the step is cut into micro-batches.

    Shapes: all tensors (B, R); response_mask is bool, True on generated tokens.
    """
    log_ratio = (logprobs - old_logprobs).masked_fill(~response_mask, 0.0)
    ratio = log_ratio.exp()
    surrogate = ratio * advantages
    clipped = ratio.clamp(1.0 - cliprange_low, 1.0 + cliprange_high) * advantages
    objective = torch.minimum(surrogate, clipped)
    if dual_clip > 0.0:
        bounded = torch.maximum(objective, dual_clip * advantages)
        objective = torch.where(advantages < 0.0, bounded, objective)
    loss = -masked_sum(objective, response_mask)
    stats = {
        "policy/clipfrac": (clipped < surrogate).float(),
        "policy/approx_kl": ratio - 1.0 - log_ratio,  # k3 estimator, never negative
        "policy/ratio": ratio,
    }
    return loss, {name: masked_sum(x.detach(), response_mask) for name, x in stats.items()}


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor, *, cliprange: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped value loss (Schulman et al. 2017, section 6.1 of the reference code), summed over response
    tokens.

        L = 1/2 sum_t m_t * max((V_t - G_t)^2, (clip(V_t, Vold_t - eps, Vold_t + eps) - G_t)^2)

    Shapes: all tensors (B, R); response_mask is bool, True on generated tokens.
    """
    clipped = torch.clamp(values, old_values - cliprange, old_values + cliprange)
    error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * masked_sum(torch.maximum(error, clipped_error), response_mask)
    stats = {"value/clipfrac": (clipped_error > error).float(), "value/error": error}
    return loss, {name: masked_sum(x.detach(), response_mask) for name, x in stats.items()}


def pairwise_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    weights: Tensor | None = None,
    probabilities: Tensor | None = None,
    margins: Tensor | None = None,
    label_smoothing: float = 0.0,
    centering_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Bradley-Terry negative log-likelihood (Ouyang et al. 2022, eq. 1), summed over pairs.

        L = sum -q log sigmoid(d - m) - (1 - q) log sigmoid(-(d - m)) + c (s_w + s_l)^2
        d = s_w - s_l,   q = p (1 - e) + (1 - p) e

    p is the probability that w is the better one, 1 without `probabilities`: soft labels (Lee et al. 2023,
    "RLAIF"), and ties at 1/2. m asks for a wider gap where people saw one (Touvron et al. 2023, eq. 2); e
    is the share of labels held to be wrong, and keeps the scores of noisy pairs finite; c keeps scores near
    zero (Eisenstein et al. 2023, section 2), which the likelihood alone leaves free. Each pair counts its
    weight, 1 without `weights`.

    Shapes: (B,) each.
    """
    gap = chosen_scores - rejected_scores
    counts = torch.ones_like(gap) if weights is None else weights
    wanted = gap if margins is None else gap - margins
    sure = torch.ones_like(gap) if probabilities is None else probabilities
    q = sure * (1.0 - label_smoothing) + (1.0 - sure) * label_smoothing
    loss = -q * logsigmoid(wanted) - (1.0 - q) * logsigmoid(-wanted)
    if centering_coef > 0.0:
        loss = loss + centering_coef * (chosen_scores + rejected_scores) ** 2
    seen = gap.detach()
    return (counts * loss).sum(), {
        "train/accuracy": (counts * torch.where(seen > 0, sure, 1.0 - sure)).sum(),
        "train/margin": (counts * seen).sum(),
    }


def rating_loss(
    scores: Tensor, ratings: Tensor, *, weights: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared distance between scores and ratings, summed over answers.

    The regression of a reward model on absolute judgements (Wang et al. 2024, "HelpSteer2").
    Shapes: (N,) each.
    """
    counts = torch.ones_like(scores) if weights is None else weights
    error = (counts * (scores - ratings) ** 2).sum()
    return 0.5 * error, {"train/rating_error": error.detach()}
