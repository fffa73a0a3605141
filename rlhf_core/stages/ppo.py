"""Stage `ppo`: optimise the policy against the reward model, with a KL price to the frozen SFT reference.

The policy starts as the SFT model, or (`ppo.start` champion) where an earlier run's policy ended. The
reference is the SFT model either way, so KL is the whole way from it, and price and budget hold over all
runs together.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_core import ranks
from rlhf_core.checkpoint import (
    Checkpoints,
    inputs_digest,
    load_optimizer_tensors,
    load_parameter_tensors,
    optimizer_tensors,
    parameter_tensors,
)
from rlhf_core.config import Params, PPOConfig
from rlhf_core.data.rows import read_rows
from rlhf_core.errors import InputError
from rlhf_core.labelers import FunctionLabeler, Labeler, make_labeler
from rlhf_core.layout import Layout
from rlhf_core.modeling import lora, sharding
from rlhf_core.modeling.loading import load_policy, load_tokenizer, read_provenance
from rlhf_core.modeling.reward import (
    load_head,
    load_normalisation,
    member_directories,
    member_role,
    scorer_of_roles,
)
from rlhf_core.modeling.roles import REFERENCE, FullRoles, Roles, adapter_roles
from rlhf_core.optim import SkipGuard, held_moments, make_optimizer
from rlhf_core.rl.alarms import MOST_LOGPROB_GAP, alarms
from rlhf_core.rl.kl import KLController
from rlhf_core.rl.ppo import update
from rlhf_core.rl.rewards import Messages, ScoreShaper
from rlhf_core.rl.rollout import Actors, Rollout, collect, rollout_metrics
from rlhf_core.rollout_engines.engine import RolloutEngine, open_engine
from rlhf_core.stages.sft import CompletionTask, encode_file, save_causal_model
from rlhf_core.tracking import Tracker
from rlhf_core.training import in_micro_batches, restore_history, step_rows

ADAM_EPS = 1e-5  # of the PPO reproductions (Huang et al. 2024)


def run(params: Params, layout: Layout, tracker: Tracker) -> dict[str, float]:
    config = params.ppo
    prompt_file = layout.prepared_file("prompts", "train")
    prompts = [row["messages"] for row in read_rows(prompt_file)]
    if len(prompts) < config.prompts_per_update:
        raise InputError(
            f"{prompt_file}: {len(prompts)} prompts are fewer than the {config.prompts_per_update} of one "
            "update (ppo.rollout_batch_size / ppo.samples_per_prompt)"
        )
    tracker.dataset("prompts", prompt_file, "training")
    with open_engine(params, layout, prompts, tracker.say) as engine:
        return train(params, layout, tracker, prompts, engine)


def train(
    params: Params, layout: Layout, tracker: Tracker, prompts: list[Messages], engine: RolloutEngine
) -> dict[str, float]:
    config, prompt_file = params.ppo, layout.prepared_file("prompts", "train")
    actors = replace(open_actors(params, layout), engine=engine)
    demonstrations = layout.prepared_file("demonstrations", "train")
    mixed_in = [demonstrations] if config.ptx_coef else []
    for file in mixed_in:
        tracker.dataset("demonstrations", file, "training")
    gold = make_labeler(params.evaluate.gold, params.evaluate.gold_target, params.run)
    sections = {"run", "model", "ppo"} | ({"sft"} if config.ptx_coef else set())
    models = [layout.model(name) for name in sorted({"sft", config.start})]
    origin = {
        "params": params.model_dump(mode="json", include=sections),
        "inputs": inputs_digest(
            [*models, *member_directories(layout.model("reward")), prompt_file, *mixed_in]
        ),
    }
    checkpoints = Checkpoints(layout.run_dir("ppo") / "checkpoints", origin)
    mix = DemonstrationMix(actors.roles, params, demonstrations) if config.ptx_coef else None
    training = Training(actors, params, prompts, gold, checkpoints, tracker, mix)
    metrics = training.run()
    save_causal_model(actors.roles, layout.model("policy"), params, read_provenance(layout.model("sft")))
    checkpoints.clear()
    return metrics


def open_actors(params: Params, layout: Layout) -> Actors:
    """Reference: SFT. Critic: the first member of the reward model. Actor: what `ppo.start` says."""
    sft, reward, start = (layout.model(name) for name in ("sft", "reward", params.ppo.start))
    members = member_directories(reward)
    roles: Roles
    if params.model.finetuning == "full":
        roles = FullRoles(load_tokenizer(sft), params)
        roles.add("policy", path=start)
        roles.add(REFERENCE, path=sft, trained=False)
        if params.ppo.has_critic:
            roles.add("critic", path=reward)
        for i, directory in enumerate(members):
            roles.add(member_role(i), path=directory, trained=False)
    else:
        model, tokenizer = load_policy(sft, params.run, kernels=params.model.kernels)
        roles = adapter_roles(model, tokenizer, params)
        if start != sft:
            lora.check_fits(start, sft, params.model.lora)
        roles.add("policy", seed=params.run.seed, start=None if start == sft else start)
        if params.ppo.has_critic:
            roles.add("critic", seed=0, start=reward)
        for i, directory in enumerate(members):
            roles.add(member_role(i), seed=0, start=directory)
    roles.shard()
    with roles.using("policy") as model:
        heads = [load_head(path, model.config.hidden_size).to(roles.device) for path in members]
    constants = [load_normalisation(path) for path in members]
    scorer = scorer_of_roles(roles, heads, constants, reward)
    head = copy.deepcopy(heads[0])
    constants[0].fold_into(head)
    target = params.ppo.reward_function
    function = FunctionLabeler(target, layout.root) if target else None
    return Actors(roles, head if params.ppo.has_critic else None, scorer, function)


class DemonstrationMix:
    """The loss on demonstrations that PPO-ptx adds, so that the policy does not forget them.

    InstructGPT mixes in pre-training text (Ouyang et al. 2022, section 3.5, gamma E[log p(x)]); here it is
    what the base of the policy was tuned on.
    """

    def __init__(self, roles: Roles, params: Params, file: Path) -> None:
        config = params.ppo
        self.coef, self.batch_size, self.seed = config.ptx_coef, config.ptx_batch_size, params.run.seed
        self.micro_batch_size = config.micro_batch_size
        self.most_steps = config.num_ppo_epochs * config.rollout_batch_size // config.minibatch_size
        sft = params.sft
        self.rows, _ = encode_file(
            roles.tokenizer, file, sft.max_length, sft.num_rows, self.seed, sft.loss_on
        )
        self.task = CompletionTask(roles, [], sft.model_copy(update={"neftune_alpha": 0.0}), self.seed)

    def backward(self, step: int) -> float:
        """Add coef * loss per token of the demonstrations of `step` to the gradient; that loss."""
        rows = [self.rows[i] for i in step_rows(len(self.rows), self.batch_size, step, self.seed)]
        weight = self.task.weight(rows)
        sums = []
        parts = in_micro_batches(rows, self.micro_batch_size, len)
        for part, counts in ranks.share_passes(parts):
            loss, _ = self.task.loss(part)
            (counts * self.coef * loss / weight).backward()
            sums.append({"loss": counts * loss.detach() / weight})
        return ranks.total(sums)["loss"]


@dataclass
class Snapshot:
    """The policy of the last rollout whose KL was within the budget."""

    update: int
    parameters: list[Tensor]


class Training:
    """The state of a PPO run: models, optimizers, position, and the newest policy within the KL budget."""

    def __init__(
        self,
        actors: Actors,
        params: Params,
        prompts: Sequence[list[dict[str, str]]],
        gold: Labeler,
        checkpoints: Checkpoints,
        tracker: Tracker,
        mix: DemonstrationMix | None = None,
    ) -> None:
        self.actors, self.config, self.seed = actors, params.ppo, params.run.seed
        self.prompts, self.gold = prompts, gold
        self.checkpoints, self.tracker = checkpoints, tracker
        config = params.ppo
        policy, critic = actors.policy_parameters(), actors.critic_parameters()
        self.policy_optimizer = make_optimizer(policy, config.learning_rate, eps=ADAM_EPS)
        self.critic_optimizer = (
            make_optimizer(critic, config.critic_learning_rate, eps=ADAM_EPS) if critic else None
        )
        self.kl = KLController(config.kl_coef, config.kl_target, config.kl_horizon)
        self.shape = ScoreShaper(config)
        self.mix = mix
        self.guard = SkipGuard()
        self.average = [p.detach().clone() for p in actors.policy_parameters()] if config.ema_decay else []
        self.snapshot: Snapshot | None = None
        self.seconds: dict[str, float] = {}
        self.flops = {"rollout": 0.0, "update": 0.0}
        self.tokens = 0  # of responses, since this process began

    def run(self) -> dict[str, float]:
        """Alternate rollouts and updates; the last rollout only measures what training ends with."""
        config = self.config
        start = self.resume()
        self.tracker.progress(start, config.num_updates)
        for number in range(start, config.num_updates + 1):
            if number == config.num_updates:
                self.tracker.progress(number, config.num_updates, "last rollout")
            rollout = self.timed("rollout", lambda n=number: self.rollout(n))
            self.flops["rollout"] += self.actors.rollout_flops(rollout)
            self.tokens += int(rollout.response_mask.sum())
            metrics = rollout_metrics(rollout, self.config, self.kl.coef) | self.gold_metrics(rollout)
            over_budget = metrics["objective/kl"] > config.kl_budget
            if over_budget or number == config.num_updates:
                self.tracker.log(metrics, number)
                self.tracker.progress(number, config.num_updates, "saving")
                break
            self.snapshot = Snapshot(number, self.to_keep())
            self.set_learning_rates(number)
            metrics |= self.timed("update", lambda n=number, r=rollout: self.update(n, r))
            passes = metrics["policy/num_steps"] * config.minibatch_size / config.rollout_batch_size
            self.flops["update"] += passes * self.actors.update_flops(rollout)
            all_skipped = metrics.get("policy/skipped_steps") == metrics["policy/num_steps"]
            if metrics.get("policy/skipped_steps"):
                self.tracker.table("skipped_batch", sample_rows(number, rollout, len(rollout.answers)))
            self.guard.note(all_skipped, f"ppo, update {number}")
            self.kl.update(metrics["objective/kl"], config.rollout_batch_size)
            self.report(number, rollout, metrics)
            if (number + 1) % config.checkpoint_every == 0 and number + 1 < config.num_updates:
                self.save(number + 1)
        if over_budget and self.snapshot is not None:
            self.set_policy(self.snapshot.parameters)
        elif self.average:
            self.set_policy(self.average)
        first = self.tracker.history[0]
        last = self.tracker.history[-2 if over_budget and len(self.tracker.history) > 1 else -1]
        self.log_speed()
        return final_metrics(first, last, number, over_budget, config)

    def to_keep(self) -> list[Tensor]:
        """A copy of the policy that would be saved now."""
        return [p.detach().clone() for p in self.average or self.actors.policy_parameters()]

    def set_policy(self, parameters: Sequence[Tensor]) -> None:
        named = {f"p.{i}": parameter for i, parameter in enumerate(parameters)}
        load_parameter_tensors(self.actors.policy_parameters(), "p", named)

    def rollout(self, number: int) -> Rollout:
        rows = step_rows(len(self.prompts), self.config.prompts_per_update, number, self.seed)
        if len(rows) < self.config.prompts_per_update:  # the tail of an epoch: filled up from its start
            rows += step_rows(len(self.prompts), self.config.prompts_per_update - len(rows), 0, self.seed + 1)
        prompts = [self.prompts[i] for i in rows]
        if any(row.get("rollout/logprob_gap", 0.0) > MOST_LOGPROB_GAP for row in self.tracker.history):
            self.config = self.config.model_copy(update={"old_logprobs": "trainer"})
        return collect(self.actors, prompts, self.config, self.stream_seed(number), self.kl.coef, self.shape)

    def update(self, number: int, rollout: Rollout) -> dict[str, float]:
        warm = number >= self.config.critic_warmup_updates
        optimizers = self.policy_optimizer if warm else None, self.critic_optimizer
        seed, mix = self.stream_seed(number), self.mix
        mixed = None if mix is None else lambda step: mix.backward(number * mix.most_steps + step)
        metrics = update(self.actors, *optimizers, rollout, self.config, seed, self.kl.coef, mixed)
        self.move_average()
        return metrics

    @torch.no_grad()
    def move_average(self) -> None:
        """The average starts where the policy does, and follows the trained one."""
        for mean, parameter in zip(self.average, self.actors.policy_parameters(), strict=bool(self.average)):
            mean.lerp_(parameter, 1.0 - self.config.ema_decay)

    def stream_seed(self, number: int) -> int:
        """Of the random numbers of one update: a function of the seeds and the update, so a resume needs no
        state."""
        return (self.config.sampling.seed * 1_000_003 + self.seed) * 1_000_003 + number

    def set_learning_rates(self, number: int) -> None:
        factor = learning_rate_factor(number, self.config)
        pairs = (
            (self.policy_optimizer, self.config.learning_rate),
            (self.critic_optimizer, self.config.critic_learning_rate),
        )
        for optimizer, rate in pairs:
            for group in optimizer.param_groups if optimizer is not None else ():
                group["lr"] = rate * factor

    def gold_metrics(self, rollout: Rollout) -> dict[str, float]:
        """The judge of the evaluation, only watched here: proxy up and gold down is over-optimisation."""
        prompts = [messages[-1]["content"] for messages in rollout.conversations]
        scores = self.gold.score(prompts, [answer.text for answer in rollout.answers])
        return {"objective/gold": sum(scores) / len(scores)}

    def report(self, number: int, rollout: Rollout, metrics: dict[str, float]) -> None:
        self.tracker.log(
            metrics | {"policy/learning_rate": self.policy_optimizer.param_groups[0]["lr"]}, number
        )
        note = f"score {metrics['objective/scores']:.2f} kl {metrics['objective/kl']:.1f}"
        self.tracker.progress(number + 1, self.config.num_updates, note)
        for name, text in alarms(self.tracker.history, self.config.kl_budget).items():
            self.tracker.warn(name, text)
        self.tracker.table("rollout_samples", sample_rows(number, rollout, 8))

    def timed(self, phase: str, work):
        started = time.monotonic()
        result = work()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - started
        return result

    def log_speed(self) -> None:
        perf = {"perf/response_tokens_per_second": self.tokens / max(1e-9, sum(self.seconds.values()))}
        perf["perf/held_moments"] = held_moments(self.policy_optimizer)
        for phase, seconds in self.seconds.items():
            perf[f"perf/{phase}_seconds"] = seconds
            perf[f"perf/{phase}_gflops_per_second"] = self.flops[phase] / 1e9 / max(1e-9, seconds)
        self.tracker.log_perf(perf)

    def save(self, number: int) -> None:
        assert self.snapshot is not None
        tensors = (
            parameter_tensors(self.actors.policy_parameters(), "policy")
            | parameter_tensors(self.actors.critic_parameters(), "critic")
            | optimizer_tensors(self.policy_optimizer, "policy_optimizer")
            | (optimizer_tensors(self.critic_optimizer, "critic_optimizer") if self.critic_optimizer else {})
            | {f"snapshot.{i}": p for i, p in enumerate(self.snapshot.parameters)}
            | {f"average.{i}": p for i, p in enumerate(self.average)}
        )
        state = {
            "next": number,
            "history": self.tracker.history,
            "snapshot_update": self.snapshot.update,
            "kl_coef": self.kl.coef,
            "score_moments": self.shape.state(),
        }
        self.checkpoints.save(number, tensors, state)

    def resume(self) -> int:
        """Take up the newest checkpoint; the number of the update to go on with."""
        checkpoint = self.checkpoints.load_latest()
        if checkpoint is None:
            return 0
        tensors = checkpoint.tensors
        load_parameter_tensors(self.actors.policy_parameters(), "policy", tensors)
        load_parameter_tensors(self.actors.critic_parameters(), "critic", tensors)
        load_optimizer_tensors(self.policy_optimizer, "policy_optimizer", tensors)
        if self.critic_optimizer is not None:
            load_optimizer_tensors(self.critic_optimizer, "critic_optimizer", tensors)
        self.kl.coef = checkpoint.state["kl_coef"]
        self.shape.load(checkpoint.state["score_moments"])
        policy = self.actors.policy_parameters()
        self.average = [sharding.placed_like(tensors[f"average.{i}"], p) for i, p in enumerate(self.average)]
        kept = [sharding.placed_like(tensors[f"snapshot.{i}"], p) for i, p in enumerate(policy)]
        self.snapshot = Snapshot(checkpoint.state["snapshot_update"], kept)
        restore_history(self.tracker, checkpoint.state["history"])
        return int(checkpoint.state["next"])


def sample_rows(number: int, rollout: Rollout, most: int) -> list[dict[str, Any]]:
    """The first `most` episodes, for people to read."""
    episodes = zip(rollout.conversations, rollout.answers, rollout.scores.tolist(), strict=True)
    return [
        {
            "update": number,
            "prompt": messages[-1]["content"],
            "response": answer.text,
            "score": round(score, 3) if math.isfinite(score) else None,
        }
        for messages, answer, score in list(episodes)[:most]
    ]


def learning_rate_factor(number: int, config: PPOConfig) -> float:
    """Linear warm-up over `warmup_updates`, then linear to 0 at the end."""
    if number < config.warmup_updates:
        return (number + 1) / (config.warmup_updates + 1)
    return 1.0 - (number - config.warmup_updates) / max(1, config.num_updates - config.warmup_updates)


def final_metrics(
    first: dict[str, float], last: dict[str, float], updates: int, over_budget: bool, config: PPOConfig
) -> dict[str, float]:
    """Before and after; with a KL over the budget, `last` is the rollout of the policy that is kept."""
    return {
        "ppo/num_updates": updates,
        "ppo/stopped_by_kl_budget": int(over_budget),
        "ppo/num_episodes": updates * config.rollout_batch_size,
        "ppo/score_before": first["objective/scores"],
        "ppo/score": last["objective/scores"],
        "ppo/gold_before": first["objective/gold"],
        "ppo/gold": last["objective/gold"],
        "ppo/kl": last["objective/kl"],
        "ppo/kl_budget": config.kl_budget,
        "ppo/response_length_before": first["rollout/response_length"],
        "ppo/response_length": last["rollout/response_length"],
        "ppo/eos_rate": last["rollout/eos_rate"],
    }
