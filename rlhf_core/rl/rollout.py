"""Collecting experience: the models of PPO, the episodes they make, and what a rollout says of its policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from rlhf_core import ranks
from rlhf_core.config import PPOConfig
from rlhf_core.evaluation.text_metrics import repeated_share
from rlhf_core.generation import Generation
from rlhf_core.modeling.encoding import TokenBatch, encode_prompt, length_order, make_batch
from rlhf_core.modeling.logprobs import response_hidden, scatter_to_mask, token_logprobs
from rlhf_core.modeling.reward import RewardScorer, ScalarHead
from rlhf_core.modeling.roles import REFERENCE, Roles
from rlhf_core.rl.advantages import gae, grpo, rewards_to_go, rloo, token_rewards
from rlhf_core.rl.kept import KeptValues
from rlhf_core.rl.kl import kl_estimate
from rlhf_core.rl.rewards import Messages, RewardFunction, ScoreShaper, reward_parts
from rlhf_core.rl.tensor_ops import masked_mean, masked_sum, masked_var, whiten
from rlhf_core.rollout_engines.engine import OwnEngine, RolloutEngine


@dataclass(frozen=True)
class Actors:
    """The models of PPO: roles policy, reference, critic and reward; the critic's head when there is one."""

    roles: Roles
    value_head: ScalarHead | None
    scorer: RewardScorer
    reward_function: RewardFunction | None = None
    kept_values: KeptValues = field(default_factory=KeptValues)
    engine: RolloutEngine = field(default_factory=OwnEngine)

    def policy_parameters(self) -> list[nn.Parameter]:
        return self.roles.parameters("policy")

    def critic_parameters(self) -> list[nn.Parameter]:
        if self.value_head is None:
            return []
        return [*self.roles.parameters("critic"), *self.value_head.parameters()]

    def rollout_flops(self, rollout: Rollout) -> float:
        """Generation, and one pass of reference, critic and each reward model."""
        tokens, predicted = rollout.work()
        flops = self.roles.flops("policy")
        others = len(self.scorer.members) + (self.value_head is not None)
        return 2 * flops.forward(tokens, predicted) + others * flops.forward(tokens)

    def update_flops(self, rollout: Rollout) -> float:
        """One pass of training over the rollout."""
        tokens, predicted = rollout.work()
        flops = self.roles.flops("policy")
        critic = 0.0 if self.value_head is None else flops.training(tokens)
        return flops.training(tokens, predicted) + critic

    def logprobs(
        self, role: str, batch: TokenBatch, temperature: float, *, entropy_gradient: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the response tokens, (B, R) each, zero outside the mask."""
        hidden = response_hidden(self.roles.hidden(role, *batch.inputs), batch)
        tokens = batch.responses[batch.response_mask]
        logprobs, entropy = token_logprobs(
            self.roles.logits(role, hidden), tokens, temperature, entropy_gradient=entropy_gradient
        )
        return scatter_to_mask(logprobs, batch.response_mask), scatter_to_mask(entropy, batch.response_mask)

    def values(self, batch: TokenBatch) -> Tensor:
        """Estimates just before each response token, (B, R), zero outside the mask or without a critic."""
        if self.value_head is None:
            return torch.zeros(batch.response_mask.shape, device=batch.response_mask.device)
        hidden = response_hidden(self.roles.hidden("critic", *batch.inputs), batch)
        return scatter_to_mask(self.value_head(hidden), batch.response_mask)


_TENSORS = ("response_mask", "logprobs", "ref_logprobs", "values", "advantages", "returns")


@dataclass(frozen=True)
class Rollout:
    """Episodes and all that training on them needs. B episodes, R longest response; zero outside the mask."""

    conversations: list[Messages]  # B
    answers: list[Generation]  # B
    prompts: list[list[int]]  # B
    response_mask: Tensor  # (B, R) bool, True on response tokens, EOS included
    logprobs: Tensor  # (B, R) of the policy that sampled
    ref_logprobs: Tensor  # (B, R)
    values: Tensor  # (B, R)
    parts: dict[str, Tensor]  # (B,) each: what the score adds up from
    scores: Tensor  # (B,)
    advantages: Tensor  # (B, R)
    returns: Tensor  # (B, R)

    @property
    def logprob_gap(self) -> float:
        """Mean distance between the log-probabilities of generation and of training, in nats per token."""
        return (self.logprobs[self.response_mask] - self.drawn_logprobs).abs().mean().item()

    @property
    def drawn_logprobs(self) -> Tensor:
        """What generation found each response token to have, (N,) in row order."""
        drawn = [logprob for answer in self.answers for logprob in answer.logprobs]
        return torch.tensor(drawn, device=self.logprobs.device)

    @property
    def kl(self) -> Tensor:
        """KL to the reference by episode, (B,): the k1 estimate summed over tokens, in nats."""
        return (self.logprobs - self.ref_logprobs).masked_fill(~self.response_mask, 0.0).sum(dim=1)

    def work(self) -> tuple[int, int]:
        """Tokens of the episodes, a prompt counted once, and tokens of the responses."""
        responses = sum(len(answer.token_ids) for answer in self.answers)
        return sum(map(len, set(map(tuple, self.prompts)))) + responses, responses

    def select(self, rows: Sequence[int]) -> Rollout:
        """The episodes `rows`, trimmed to their longest response."""
        index = torch.tensor(list(rows), device=self.logprobs.device)
        longest = int(self.response_mask[index].sum(dim=1).max())
        return replace(
            self,
            conversations=[self.conversations[i] for i in rows],
            answers=[self.answers[i] for i in rows],
            prompts=[self.prompts[i] for i in rows],
            parts={name: part[index] for name, part in self.parts.items()},
            scores=self.scores[index],
            **{name: getattr(self, name)[index, :longest] for name in _TENSORS},
        )

    def micro_batch_rows(self, size: int) -> list[list[int]]:
        """Which episodes share a forward pass: those of similar length, and of one prompt."""
        order = length_order(self.prompts, [answer.token_ids for answer in self.answers])
        return [order[i : i + size] for i in range(0, len(order), size)]

    def micro_batches(self, size: int) -> list[Rollout]:
        return [self.select(rows) for rows in self.micro_batch_rows(size)]

    def to(self, device: torch.device) -> Rollout:
        return replace(
            self,
            parts={name: part.to(device) for name, part in self.parts.items()},
            scores=self.scores.to(device),
            **{name: getattr(self, name).to(device) for name in _TENSORS},
        )

    def by_prompt(self, samples_per_prompt: int) -> list[Rollout]:
        """The episodes of each prompt on their own, in order."""
        starts = range(0, len(self.answers), samples_per_prompt)
        return [self.select(range(start, start + samples_per_prompt)) for start in starts]

    def batch(self, pad_token_id: int) -> TokenBatch:
        answers = [list(answer.token_ids) for answer in self.answers]
        return make_batch(self.prompts, answers, pad_token_id, self.logprobs.device)


@torch.no_grad()
def collect(
    actors: Actors,
    conversations: Sequence[Messages],
    config: PPOConfig,
    seed: int,
    kl_coef: float | None = None,
    shape: ScoreShaper | None = None,
) -> Rollout:
    """Sample `samples_per_prompt` answers to each conversation, score them, and estimate advantages.

    `kl_coef` is the price of KL now, when it is not the one in `config`; `shape` what scores count.
    """
    price = config.kl_coef if kl_coef is None else kl_coef
    own = ranks.share(range(len(conversations)))
    with actors.roles.gathered():
        rollout = _sample(actors, conversations, own, config, seed) if own else None
    parts = rollout.to(torch.device("cpu")).by_prompt(config.samples_per_prompt) if rollout else []
    rollout = merge(ranks.gather(parts)).to(actors.roles.device)
    return with_advantages(rollout, config, price, (shape or ScoreShaper(config))(rollout.scores))


def _sample(
    actors: Actors, conversations: Sequence[Messages], own: Sequence[int], config: PPOConfig, seed: int
) -> Rollout:
    """The episodes of the conversations `own`, with everything but advantages."""
    sampling = config.sampling.model_copy(update={"seed": seed})
    tokenizer = actors.roles.tokenizer
    grouped = actors.engine.answer(
        actors.roles,
        conversations,
        sampling,
        samples_per_prompt=config.samples_per_prompt,
        batch_size=config.rollout_batch_size,
        only=own,
    )
    repeated = [conversations[i] for i in own for _ in range(config.samples_per_prompt)]
    answers = [answer for group in grouped for answer in group]
    prompts = [encode_prompt(tokenizer, messages) for messages in repeated]

    parts = reward_parts(actors.scorer, actors.reward_function, config, repeated, answers)
    parts = {name: part.to(actors.roles.device) for name, part in parts.items()}
    blank = _empty(answers, actors.roles.device)
    rollout = Rollout(
        conversations=repeated,
        answers=answers,
        prompts=prompts,
        parts=parts,
        scores=torch.stack(list(parts.values())).sum(dim=0),
        **dict.fromkeys(_TENSORS, blank),
    )
    rollout = replace(rollout, response_mask=_mask(answers, actors.roles.device))
    return _with_forwards(actors, rollout, config)


def merge(parts: Sequence[Rollout]) -> Rollout:
    """One rollout of all episodes, in order, padded to the longest response."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.response_mask.shape[1] for part in parts)

    def joined(name: str) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        return torch.cat([nn.functional.pad(t, (0, longest - t.shape[1])) for t in tensors])

    return Rollout(
        conversations=[messages for part in parts for messages in part.conversations],
        answers=[answer for part in parts for answer in part.answers],
        prompts=[prompt for part in parts for prompt in part.prompts],
        parts={name: torch.cat([part.parts[name] for part in parts]) for name in parts[0].parts},
        scores=torch.cat([part.scores for part in parts]),
        **{name: joined(name) for name in _TENSORS},
    )


def _mask(answers: Sequence[Generation], device: torch.device) -> Tensor:
    lengths = torch.tensor([len(answer.token_ids) for answer in answers])
    return (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)


def _empty(answers: Sequence[Generation], device: torch.device) -> Tensor:
    return torch.zeros(len(answers), max(len(a.token_ids) for a in answers), device=device)


def _with_forwards(actors: Actors, rollout: Rollout, config: PPOConfig) -> Rollout:
    """Fill in log-probabilities and values, a micro-batch at a time."""
    temperature = config.sampling.temperature
    filled = {name: torch.zeros_like(rollout.logprobs) for name in ("logprobs", "ref_logprobs", "values")}
    for rows in rollout.micro_batch_rows(config.micro_batch_size):
        part = rollout.select(rows)
        batch = part.batch(actors.roles.tokenizer.pad_token_id)
        found = {
            "ref_logprobs": actors.logprobs(REFERENCE, batch, temperature)[0],
            "values": _values(actors, part, batch, config),
        }
        if config.old_logprobs == "trainer":
            found["logprobs"] = actors.logprobs("policy", batch, temperature)[0]
        for name, tensor in found.items():
            filled[name][rows, : tensor.shape[1]] = tensor
    if config.old_logprobs == "generation":
        filled["logprobs"] = scatter_to_mask(rollout.drawn_logprobs, rollout.response_mask)
    return replace(rollout, **filled)


def _values(actors: Actors, part: Rollout, batch: TokenBatch, config: PPOConfig) -> Tensor:
    """The critic's values; its pass is kept where the first step will see the same episodes in one pass."""
    whole = min(config.minibatch_size, config.micro_batch_size) >= config.rollout_batch_size
    if not whole or actors.value_head is None or ranks.count() > 1:
        return actors.values(batch)
    with torch.enable_grad():
        values = actors.values(batch)
    actors.kept_values.keep(part, values, actors.critic_parameters())
    return values.detach()


def with_advantages(
    rollout: Rollout, config: PPOConfig, kl_coef: float, scores: Tensor | None = None
) -> Rollout:
    """Fill in advantages and, for a critic, returns; whitened over the whole batch if the method does.

    `scores` (B,) are what counts, when it is not `rollout.scores`.
    """
    scores = rollout.scores if scores is None else scores
    mask = rollout.response_mask
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, config.kl_estimator)
    in_reward = kl_coef if config.kl_in == "reward" else 0.0
    rewards = token_rewards(scores, kl, mask, kl_coef=in_reward)
    if config.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    returns = torch.zeros_like(rewards)
    if config.advantages == "gae":
        advantages, returns = gae(
            rewards, rollout.values, mask, gamma=config.gamma, gae_lambda=config.gae_lambda
        )
        advantages = whiten(advantages, mask)
    elif config.advantages == "reinforce++":
        advantages = whiten(rewards_to_go(rewards, mask, gamma=config.gamma), mask)
    else:
        estimate = rloo if config.advantages == "rloo" else grpo
        advantages = estimate(rewards, mask, group_size=config.samples_per_prompt)
    return replace(rollout, advantages=advantages, returns=returns)


def rollout_metrics(rollout: Rollout, config: PPOConfig, kl_coef: float | None = None) -> dict[str, float]:
    """What the rollout says of the policy that made it. Per episode unless named otherwise."""
    price = config.kl_coef if kl_coef is None else kl_coef
    mask = rollout.response_mask
    kl = rollout.kl
    finished = torch.tensor([answer.finished for answer in rollout.answers], dtype=torch.float32)
    further = {}
    if config.has_critic:
        residual = masked_var(rollout.returns - rollout.values, mask)
        explained = 1.0 - residual / masked_var(rollout.returns, mask).clamp(min=1e-8)
        further = {
            "value/mean": masked_mean(rollout.values, mask).item(),
            "value/explained_variance": explained.item(),
        }
    if config.old_logprobs == "trainer":
        further["rollout/logprob_gap"] = rollout.logprob_gap
    parts = {f"reward_part/{name}": part.mean().item() for name, part in rollout.parts.items()}
    return {
        "objective/scores": rollout.scores.mean().item(),
        "objective/scores_std": rollout.scores.std(unbiased=False).item(),
        "objective/kl": kl.mean().item(),
        "objective/kl_coef": price,
        "objective/kl_per_token": (kl.sum() / mask.sum()).item(),
        "objective/rlhf_reward": (rollout.scores - price * kl).mean().item(),
        "objective/entropy": -masked_mean(rollout.logprobs, mask).item(),  # E[-log p], by the sample
        "rollout/response_length": mask.sum(dim=1).float().mean().item(),
        "rollout/eos_rate": finished.mean().item(),
        "rollout/repeated_4": repeated_share([answer.text for answer in rollout.answers]),
        "rollout/tokens": masked_sum(torch.ones_like(rollout.logprobs), mask).item(),
        **further,
        **parts,
    }
