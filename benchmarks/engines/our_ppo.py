"""PPO of this project, on the same case."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from benchmarks.clock import now, peak_gib
from benchmarks.endless import EndlessTokenizer
from rlhf_core.allocator import keep_freed
from rlhf_core.config import Params, PPOConfig, load_params
from rlhf_core.modeling.loading import load_policy, load_tokenizer
from rlhf_core.modeling.reward import Normalisation, ScalarHead, scorer_of_roles
from rlhf_core.modeling.roles import REFERENCE, AdapterRoles, FullRoles, Roles, adapter_roles
from rlhf_core.optim import Optimizer, make_optimizer
from rlhf_core.rl import rollout as rollouts
from rlhf_core.rl.ppo import update
from rlhf_core.rl.rollout import Actors, collect
from rlhf_core.rollout_engines import engine
from rlhf_core.stages.ppo import ADAM_EPS


def params_of(case: dict) -> Params:
    params = load_params(Path("params.yaml"))
    sampling = params.ppo.sampling.model_copy(
        update={"temperature": 1.0, "max_new_tokens": case["response_length"]}
    )
    batch = case["batch"]
    changes = {
        "rollout_batch_size": batch,
        "samples_per_prompt": 1,
        "minibatch_size": batch // case["minibatches"],
        "micro_batch_size": batch // case["minibatches"],
        "num_ppo_epochs": case["epochs"],
        "learning_rate": 1e-5,
        "critic_learning_rate": 1e-5,
        "missing_eos_penalty": 0.0,
        "sampling": sampling,
    }
    return params.model_copy(
        update={
            "run": params.run.model_copy(update={"precision": "auto" if case["bf16"] else "float32"}),
            "model": params.model.model_copy(update={"finetuning": "lora" if case["lora"] else "full"}),
            "ppo": params.ppo.model_copy(update=changes),
        }
    )


def make_actors(case: dict, params: Params) -> Actors:
    base = Path(case["model"])
    roles: Roles
    if case["lora"]:
        model, tokenizer = load_policy(base, params.run)
        roles = adapter_roles(model, tokenizer, params)
        for seed, role in enumerate(("policy", "critic", "reward")):
            roles.add(role, seed=seed)
    else:
        roles = FullRoles(load_tokenizer(base), params)
        for role in ("policy", REFERENCE, "critic", "reward"):
            roles.add(role, path=base, trained=role in ("policy", "critic"))
    if not case["stop"]:
        roles.tokenizer = EndlessTokenizer(roles.tokenizer)
    with roles.using("policy") as model:
        heads = [ScalarHead(model.config.hidden_size, seed).to(roles.device) for seed in range(2)]
    scorer = scorer_of_roles(roles, heads[:1], [Normalisation(0.0, 1.0)], base)
    return Actors(roles, heads[1], scorer)


def make_optimizers(actors: Actors, config: PPOConfig) -> tuple[Optimizer, Optimizer]:
    return (
        make_optimizer(actors.policy_parameters(), config.learning_rate, eps=ADAM_EPS),
        make_optimizer(actors.critic_parameters(), config.critic_learning_rate, eps=ADAM_EPS),
    )


def watch(phases: dict[str, float]) -> None:
    """Add up in `phases` what generation, each model's passes and the log-probabilities take."""

    def timed(name: Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            started = now()
            found = function(*arguments, **named)
            phase = name(*arguments)
            phases[phase] = phases.get(phase, 0.0) + now() - started
            return found

        return wrapped

    engine.generate = timed(lambda *_: "generation", engine.generate)
    rollouts.token_logprobs = timed(lambda *_: "logprobs", rollouts.token_logprobs)
    for kind in (FullRoles, AdapterRoles):
        kind.logits = timed(lambda *_: "logprobs", kind.logits)  # type: ignore[method-assign]
        kind.hidden = timed(lambda roles, role, *_: role, kind.hidden)  # type: ignore[method-assign]


def main() -> None:
    keep_freed()  # as a stage does
    case = json.loads(Path(sys.argv[1]).read_text())
    params = params_of(case)
    config: PPOConfig = params.ppo
    phases: dict[str, float] = {}
    watch(phases)
    actors = make_actors(case, params)
    optimizers = make_optimizers(actors, config)
    conversations = case["conversations"] * (1 + (case["batches"] + 2) * case["batch"])
    seconds, tokens = [], []
    for number in range(case["batches"] + 1):
        rows = conversations[number * case["batch"] : (number + 1) * case["batch"]]
        if number == 1:
            phases.clear()
        started = now()
        rollout = collect(actors, rows, config, number)
        collected = now()
        within = dict(phases)
        update(actors, *optimizers, rollout, config, number)
        ended = now()
        phases.clear()  # the update called the same functions
        phases.update(within)
        seconds.append(ended - started)
        tokens.append(int(rollout.response_mask.sum()))
        phases["rollout"] = phases.get("rollout", 0.0) + collected - started
        phases["update"] = phases.get("update", 0.0) + ended - collected
    print(
        json.dumps(
            {
                "seconds": seconds[1:],
                "phases": {name: spent / case["batches"] for name, spent in phases.items()},
                "tokens": tokens[1:],
                "update_flops": config.num_ppo_epochs * actors.update_flops(rollout),
                "flops": actors.rollout_flops(rollout) + config.num_ppo_epochs * actors.update_flops(rollout),
                "peak_gib": peak_gib(),
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()
