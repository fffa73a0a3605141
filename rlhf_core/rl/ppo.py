"""Proximal policy optimisation on whole answers: a few passes of clipped steps over a rollout.

Actor and critic share no trained weight, so each has its own optimizer and gradient clip, and there is no
value coefficient: Adam would cancel it. With advantages other than GAE there is no critic at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from rlhf_core import ranks
from rlhf_core.config import PPOConfig
from rlhf_core.modeling.encoding import TokenBatch
from rlhf_core.optim import Optimizer, step_if_finite
from rlhf_core.rl.kl import kl_estimate
from rlhf_core.rl.losses import policy_loss, value_loss
from rlhf_core.rl.rollout import Actors, Rollout
from rlhf_core.rl.tensor_ops import masked_sum


def ppo_step(
    actors: Actors,
    policy_optimizer: Optimizer | None,
    critic_optimizer: Optimizer | None,
    minibatch: Rollout,
    config: PPOConfig,
    kl_coef: float,
    mix: Callable[[], float] | None = None,
) -> dict[str, float]:
    """Take one step of actor and critic, as far as they have an optimizer; return per-token metrics.

    `mix` adds to the policy's gradient what else it should learn, and gives that loss.
    """
    metrics: dict[str, float] = {}
    # The critic first: what the rollout kept of its pass then needs no memory beside the policy's own.
    if critic_optimizer is not None:
        objective = partial(_value_objective, actors, config=config)
        metrics |= _step(actors, critic_optimizer, minibatch, config, "value", objective)
    if policy_optimizer is not None:
        objective = partial(_policy_objective, actors, config=config, kl_coef=kl_coef)
        metrics |= _step(actors, policy_optimizer, minibatch, config, "policy", objective, mix)
    return metrics


def _step(
    actors: Actors,
    optimizer: Optimizer,
    minibatch: Rollout,
    config: PPOConfig,
    name: str,
    objective: Callable[[Rollout, TokenBatch], tuple[Tensor, dict[str, Tensor]]],
    mix: Callable[[], float] | None = None,
) -> dict[str, float]:
    """One step of one network. The other's gradients need no memory meanwhile."""
    num_tokens = minibatch.response_mask.sum()
    sums: list[dict[str, Tensor]] = []
    for part, counts in ranks.share_passes(minibatch.micro_batches(config.micro_batch_size)):
        loss, stats = objective(part, part.batch(actors.roles.tokenizer.pad_token_id))
        (counts * loss / num_tokens).backward()
        if counts:
            sums.append(stats)
    own: dict[str, float] = {}
    if mix is not None:
        own["policy/ptx_loss"] = mix()
    norm, taken = step_if_finite(optimizer, config.max_grad_norm)
    own |= {f"{name}/grad_norm": norm, f"{name}/skipped_steps": float(not taken)}
    return {name: value / int(num_tokens) for name, value in ranks.total(sums).items()} | own


def _value_objective(
    actors: Actors, part: Rollout, batch: TokenBatch, *, config: PPOConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The critic's loss, and metrics: sums over response tokens."""
    values = actors.kept_values.take(part, actors.critic_parameters())
    loss, stats = value_loss(
        actors.values(batch) if values is None else values,
        part.values,
        part.returns,
        part.response_mask,
        cliprange=config.cliprange_value,
    )
    return loss, stats | {"value/loss": loss.detach()}


def _policy_objective(
    actors: Actors, part: Rollout, batch: TokenBatch, *, config: PPOConfig, kl_coef: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The surrogate with the terms beside it, and metrics: sums over response tokens."""
    mask = part.response_mask
    logprobs, entropy = actors.logprobs(
        "policy", batch, config.sampling.temperature, entropy_gradient=config.entropy_coef > 0.0
    )
    surrogate, stats = policy_loss(
        logprobs,
        part.logprobs,
        part.advantages,
        mask,
        cliprange_low=config.cliprange_low,
        cliprange_high=config.cliprange_high,
        dual_clip=config.dual_clip,
    )
    loss = surrogate
    if config.entropy_coef > 0.0:
        loss = loss - config.entropy_coef * masked_sum(entropy, mask)
    if config.kl_in == "loss":
        kl = masked_sum(kl_estimate(logprobs, part.ref_logprobs, config.kl_estimator), mask)
        stats["policy/kl_loss"] = kl.detach()
        loss = loss + kl_coef * kl
    stats["policy/abs_log_ratio"] = masked_sum((logprobs.detach() - part.logprobs).abs(), mask)
    return loss, stats | {"policy/loss": surrogate.detach()}


def update(
    actors: Actors,
    policy_optimizer: Optimizer | None,
    critic_optimizer: Optimizer | None,
    rollout: Rollout,
    config: PPOConfig,
    seed: int,
    kl_coef: float | None = None,
    mix: Callable[[int], float] | None = None,
) -> dict[str, float]:
    """All passes over one rollout, each with a fresh permutation; metrics are means over the steps.

    With `approx_kl_stop` the passes end after the step that moved the policy further than that. `mix` is
    `ppo_step`'s, given the number of the step.

    Where the rollout took its log-probabilities from generation, the first step, which sees the policy that
    sampled, shows how far training is from them: rollout/logprob_gap.
    """
    price = config.kl_coef if kl_coef is None else kl_coef
    steps: list[dict[str, float]] = []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(config.num_ppo_epochs):
        order = episode_order(len(rollout.answers), config.samples_per_prompt, generator)
        for start in range(0, len(order), config.minibatch_size):
            minibatch = rollout.select(order[start : start + config.minibatch_size])
            mixed = None if mix is None else partial(mix, len(steps))
            steps.append(
                ppo_step(actors, policy_optimizer, critic_optimizer, minibatch, config, price, mixed)
            )
            if 0.0 < config.approx_kl_stop < steps[-1].get("policy/approx_kl", 0.0):
                return _means(steps, config)
    return _means(steps, config)


def episode_order(count: int, samples_per_prompt: int, generator: torch.Generator) -> list[int]:
    """A fresh permutation of the prompts, each with its episodes, so that they share a forward pass."""
    order = torch.randperm(count // samples_per_prompt, generator=generator).tolist()
    return [prompt * samples_per_prompt + i for prompt in order for i in range(samples_per_prompt)]


def _means(steps: Sequence[dict[str, float]], config: PPOConfig) -> dict[str, float]:
    gap = {}
    if config.old_logprobs == "generation" and "policy/abs_log_ratio" in steps[0]:
        gap["rollout/logprob_gap"] = steps[0]["policy/abs_log_ratio"]
    means = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    skipped = {name: sum(step[name] for step in steps) for name in means if name.endswith("/skipped_steps")}
    return means | skipped | gap | {"policy/num_steps": len(steps)}
