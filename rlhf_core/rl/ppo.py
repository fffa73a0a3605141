"""Proximal policy optimisation on whole answers: collect a rollout, then a few passes of clipped steps over
it.

Actor and critic share no trained weight, so each has its own optimizer and gradient clip, and there is no
value coefficient: Adam would cancel it. Left out: entropy bonus, adaptive KL, several rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rlhf_core.config import PPOConfig
from rlhf_core.generation import Generation, generate
from rlhf_core.modeling.encoding import TokenBatch, encode_prompt, make_batch
from rlhf_core.modeling.logprobs import response_hidden, scatter_to_mask, token_logprobs
from rlhf_core.modeling.reward import RewardScorer, ScalarHead
from rlhf_core.modeling.roles import REFERENCE, Roles
from rlhf_core.rl.advantages import gae, token_rewards
from rlhf_core.rl.losses import policy_loss, value_loss
from rlhf_core.rl.tensor_ops import masked_mean, masked_sum, masked_var, whiten

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Actors:
    """The models of PPO: roles policy, reference, critic and reward, and the critic's head."""

    roles: Roles
    value_head: ScalarHead
    scorer: RewardScorer

    def policy_parameters(self) -> list[nn.Parameter]:
        return self.roles.parameters("policy")

    def critic_parameters(self) -> list[nn.Parameter]:
        return [*self.roles.parameters("critic"), *self.value_head.parameters()]

    def logprobs(self, role: str, batch: TokenBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the response tokens, (B, R) each, zero outside the mask."""
        hidden = response_hidden(self.roles.hidden(role, batch.input_ids), batch)
        tokens = batch.responses[batch.response_mask]
        logprobs, entropy = token_logprobs(self.roles.logits(role, hidden), tokens, temperature)
        return scatter_to_mask(logprobs, batch.response_mask), scatter_to_mask(entropy, batch.response_mask)

    def values(self, batch: TokenBatch) -> Tensor:
        """Estimates just before each response token, (B, R), zero outside the mask."""
        hidden = response_hidden(self.roles.hidden("critic", batch.input_ids), batch)
        return scatter_to_mask(self.value_head(hidden), batch.response_mask)


@dataclass(frozen=True)
class Rollout:
    """Episodes and all that training on them needs. B episodes, R longest response; zero outside the mask."""

    conversations: list[Messages]  # B
    answers: list[Generation]  # B
    prompts: list[list[int]]  # B
    response_mask: Tensor  # (B, R) bool, True on response tokens, EOS included
    logprobs: Tensor  # (B, R) of the policy that sampled
    ref_logprobs: Tensor  # (B, R)
    entropy: Tensor  # (B, R)
    values: Tensor  # (B, R)
    scores: Tensor  # (B,) of the reward model, end penalty included
    advantages: Tensor  # (B, R), whitened over the whole batch
    returns: Tensor  # (B, R)

    @property
    def kl(self) -> Tensor:
        """KL to the reference by episode, (B,): the k1 estimate summed over tokens, in nats."""
        return (self.logprobs - self.ref_logprobs).masked_fill(~self.response_mask, 0.0).sum(dim=1)

    def lengths(self) -> list[int]:
        return self.response_mask.sum(dim=1).tolist()

    def select(self, rows: Sequence[int]) -> Rollout:
        """The episodes `rows`, trimmed to their longest response."""
        index = torch.tensor(list(rows), device=self.logprobs.device)
        longest = int(self.response_mask[index].sum(dim=1).max())
        fields = ("response_mask", "logprobs", "ref_logprobs", "entropy", "values", "advantages", "returns")
        return replace(
            self,
            conversations=[self.conversations[i] for i in rows],
            answers=[self.answers[i] for i in rows],
            prompts=[self.prompts[i] for i in rows],
            scores=self.scores[index],
            **{name: getattr(self, name)[index, :longest] for name in fields},
        )

    def micro_batches(self, size: int) -> list[Rollout]:
        """Cut by length, so that little is spent on padding."""
        order = sorted(
            range(len(self.answers)), key=lambda i: len(self.prompts[i]) + len(self.answers[i].token_ids)
        )
        return [self.select(order[i : i + size]) for i in range(0, len(order), size)]

    def batch(self, pad_token_id: int) -> TokenBatch:
        answers = [list(answer.token_ids) for answer in self.answers]
        return make_batch(self.prompts, answers, pad_token_id, self.logprobs.device)


@torch.no_grad()
def collect(actors: Actors, conversations: Sequence[Messages], config: PPOConfig, seed: int) -> Rollout:
    """Sample `samples_per_prompt` answers to each conversation, score them, and estimate advantages."""
    sampling = config.sampling.model_copy(update={"seed": seed})
    tokenizer = actors.roles.tokenizer
    with actors.roles.using("policy") as model:
        grouped = generate(
            model,
            tokenizer,
            conversations,
            sampling,
            samples_per_prompt=config.samples_per_prompt,
            batch_size=config.rollout_batch_size,
        )
    repeated = [messages for messages in conversations for _ in range(config.samples_per_prompt)]
    answers = [answer for group in grouped for answer in group]
    prompts = [encode_prompt(tokenizer, messages) for messages in repeated]

    scores = torch.tensor(actors.scorer.score(repeated, [answer.text for answer in answers]))
    unfinished = torch.tensor([not answer.finished for answer in answers])
    scores = (scores - config.missing_eos_penalty * unfinished).to(actors.roles.device)
    blank = _empty(answers, actors.roles.device)
    rollout = Rollout(
        conversations=repeated,
        answers=answers,
        prompts=prompts,
        scores=scores,
        **dict.fromkeys(_TENSORS, blank),
    )
    rollout = replace(rollout, response_mask=_mask(answers, actors.roles.device))
    return with_advantages(_with_forwards(actors, rollout, config), config)


_TENSORS = ("response_mask", "logprobs", "ref_logprobs", "entropy", "values", "advantages", "returns")


def _mask(answers: Sequence[Generation], device: torch.device) -> Tensor:
    lengths = torch.tensor([len(answer.token_ids) for answer in answers])
    return (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)


def _empty(answers: Sequence[Generation], device: torch.device) -> Tensor:
    return torch.zeros(len(answers), max(len(a.token_ids) for a in answers), device=device)


def _with_forwards(actors: Actors, rollout: Rollout, config: PPOConfig) -> Rollout:
    """Fill in log-probabilities, entropies and values, a micro-batch at a time."""
    temperature = config.sampling.temperature
    filled = {name: rollout.logprobs.clone() for name in ("logprobs", "ref_logprobs", "entropy", "values")}
    order = sorted(range(len(rollout.answers)), key=lambda i: len(rollout.prompts[i]) + rollout.lengths()[i])
    for start in range(0, len(order), config.micro_batch_size):
        rows = order[start : start + config.micro_batch_size]
        batch = rollout.select(rows).batch(actors.roles.tokenizer.pad_token_id)
        logprobs, entropy = actors.logprobs("policy", batch, temperature)
        ref_logprobs, _ = actors.logprobs(REFERENCE, batch, temperature)
        found = {
            "logprobs": logprobs,
            "ref_logprobs": ref_logprobs,
            "entropy": entropy,
            "values": actors.values(batch),
        }
        for name, tensor in found.items():
            filled[name][rows, : tensor.shape[1]] = tensor
    return replace(rollout, **filled)


def with_advantages(rollout: Rollout, config: PPOConfig) -> Rollout:
    mask = rollout.response_mask
    rewards = token_rewards(
        rollout.scores, rollout.logprobs, rollout.ref_logprobs, mask, kl_coef=config.kl_coef
    )
    advantages, returns = gae(rewards, rollout.values, mask, gamma=config.gamma, gae_lambda=config.gae_lambda)
    return replace(rollout, advantages=whiten(advantages, mask), returns=returns)


def ppo_step(
    actors: Actors,
    policy_optimizer: torch.optim.Optimizer,
    critic_optimizer: torch.optim.Optimizer,
    minibatch: Rollout,
    config: PPOConfig,
) -> dict[str, float]:
    """Take one optimizer step of actor and critic on `minibatch`; return per-token metrics."""
    num_tokens = minibatch.response_mask.sum()
    sums: list[dict[str, Tensor]] = []
    for part in minibatch.micro_batches(config.micro_batch_size):
        batch = part.batch(actors.roles.tokenizer.pad_token_id)
        mask = part.response_mask
        logprobs, _ = actors.logprobs("policy", batch, config.sampling.temperature)
        pg_loss, pg_stats = policy_loss(
            logprobs, part.logprobs, part.advantages, mask, cliprange=config.cliprange
        )
        (pg_loss / num_tokens).backward()
        values = actors.values(batch)
        vf_loss, vf_stats = value_loss(
            values, part.values, part.returns, mask, cliprange=config.cliprange_value
        )
        (vf_loss / num_tokens).backward()
        sums.append(pg_stats | vf_stats | {"policy/loss": pg_loss.detach(), "value/loss": vf_loss.detach()})

    norms = {}
    for name, optimizer in (("policy", policy_optimizer), ("value", critic_optimizer)):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norms[f"{name}/grad_norm"] = float(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: float(sum(s[name] for s in sums) / num_tokens) for name in sums[0]} | norms


def update(
    actors: Actors,
    policy_optimizer: torch.optim.Optimizer,
    critic_optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    config: PPOConfig,
    seed: int,
) -> dict[str, float]:
    """All passes over one rollout, each with a fresh permutation; metrics are means over the steps."""
    steps: list[dict[str, float]] = []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(config.num_ppo_epochs):
        order = torch.randperm(len(rollout.answers), generator=generator).tolist()
        for start in range(0, len(order), config.minibatch_size):
            minibatch = rollout.select(order[start : start + config.minibatch_size])
            steps.append(ppo_step(actors, policy_optimizer, critic_optimizer, minibatch, config))
    return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}


def rollout_metrics(rollout: Rollout, config: PPOConfig) -> dict[str, float]:
    """What the rollout says of the policy that made it. Per episode unless named otherwise."""
    mask = rollout.response_mask
    kl = rollout.kl
    finished = torch.tensor([answer.finished for answer in rollout.answers], dtype=torch.float32)
    residual = masked_var(rollout.returns - rollout.values, mask)
    return {
        "objective/scores": rollout.scores.mean().item(),
        "objective/scores_std": rollout.scores.std(unbiased=False).item(),
        "objective/kl": kl.mean().item(),
        "objective/kl_per_token": (kl.sum() / mask.sum()).item(),
        "objective/rlhf_reward": (rollout.scores - config.kl_coef * kl).mean().item(),
        "objective/entropy": masked_mean(rollout.entropy, mask).item(),
        "rollout/response_length": mask.sum(dim=1).float().mean().item(),
        "rollout/eos_rate": finished.mean().item(),
        "value/mean": masked_mean(rollout.values, mask).item(),
        "value/explained_variance": (
            1.0 - residual / masked_var(rollout.returns, mask).clamp(min=1e-8)
        ).item(),
        "rollout/tokens": masked_sum(torch.ones_like(rollout.logprobs), mask).item(),
    }
