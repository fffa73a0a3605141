"""SFT and reward model of this project, on the same case."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from benchmarks.clock import now, peak_gib
from rlhf_core.allocator import keep_freed
from rlhf_core.config import Params, load_params
from rlhf_core.modeling.pairs import Pair
from rlhf_core.modeling.reward import ScalarHead
from rlhf_core.modeling.roles import Roles, open_roles
from rlhf_core.optim import make_optimizer
from rlhf_core.stages.reward import PairwiseTask
from rlhf_core.stages.sft import CompletionTask, Example
from rlhf_core.training import Schedule, Task, train_step


def params_of(case: dict) -> Params:
    params = load_params(Path("params.yaml"))
    return params.model_copy(
        update={
            "run": params.run.model_copy(update={"precision": "auto" if case["bf16"] else "float32"}),
            "model": params.model.model_copy(update={"finetuning": "full"}),
            "sft": params.sft.model_copy(
                update={"packing": case["packing"], "max_length": case["max_length"]}
            ),
        }
    )


def make_task(case: dict, params: Params) -> tuple[Task, Roles, list[Any], list[torch.nn.Parameter]]:
    base = Path(case["model"])
    if case["task"] == "sft":
        roles = open_roles(params, base, trained=["policy"], seed=0)
        rows: list[Any] = [Example(p, r, [True] * len(r)) for p, r in case["rows"]]
        return CompletionTask(roles, [], params.sft, 0), roles, rows, roles.parameters("policy")
    roles = open_roles(params, base, trained=["reward"], seed=0)
    with roles.using("reward") as model:
        head = ScalarHead(model.config.hidden_size, 0).to(roles.device)
    rows = [(Pair(p, c, r, 0.0, str(i), "human"),) for i, (p, c, r) in enumerate(case["rows"])]
    return (
        PairwiseTask(roles, [head], [], params.reward),
        roles,
        rows,
        [
            *roles.parameters("reward"),
            *head.parameters(),
        ],
    )


def main() -> None:
    keep_freed()  # as a stage does
    case = json.loads(Path(sys.argv[1]).read_text())
    task, _, rows, parameters = make_task(case, params_of(case))
    optimizer = make_optimizer(parameters, 1e-5)
    schedule = Schedule(
        num_steps=case["batches"] + 1,
        batch_size=case["batch"],
        micro_batch_size=case["micro_batch"],
        learning_rate=1e-5,
        warmup_fraction=0.0,
        max_grad_norm=1.0,
        eval_every=10**9,
        decay="constant",
    )
    seconds, flops = [], []
    for step in range(case["batches"] + 1):
        batch = rows[step * case["batch"] : (step + 1) * case["batch"]]
        started = now()
        train_step(task, batch, optimizer, schedule, step)
        seconds.append(now() - started)
        flops.append(task.flops(batch))
    print(
        json.dumps(
            {
                "seconds": seconds[1:],
                "phases": {},
                "tokens": case["tokens"][1:],
                "flops": sum(flops[1:]) / case["batches"],
                "peak_gib": peak_gib(),
            }
        )
    )


if __name__ == "__main__":
    main()
