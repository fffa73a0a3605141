"""What bounds a batch of PPO: `python -m benchmarks.bounds 3` (`rlhf bench bounds 3`), a case of the peers'.

Where the time goes, by torch's profiler, beside the least that it could take: arithmetic at the machine's
rate of matrix products, memory at the rate of numbers changed in place. And what has to stand in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.clock import now, peak_gib
from benchmarks.engines.our_ppo import make_actors, make_optimizers, params_of
from benchmarks.peers import CASES, Case, case_named, title_of, write_case
from benchmarks.speed import matrix_ceiling
from rlhf_core.allocator import keep_freed
from rlhf_core.layout import Layout
from rlhf_core.modeling.loading import resolve_device, resolve_dtype
from rlhf_core.rl.ppo import update
from rlhf_core.rl.rollout import Actors, Rollout, collect

PRODUCTS, ATTENTION, ADAM = "products with weights", "attention", "AdamW"
KINDS = {
    PRODUCTS: ("mm", "addmm", "addmm_", "linear", "_linear_pointwise", "_reorder_linear_weight"),
    ATTENTION: ("bmm", "baddbmm", "_softmax", "_softmax_backward_data", "_scaled_dot_product"),
    ADAM: ("_fused_adamw_",),
}
OTHER = "norms, activations, logits, casts, copies"
PYTHON = "Python, and torch between its operations"
ADAM_BYTES = 28  # a weight: it, its gradient and both moments read, all but the gradient written, in float32


@dataclass(frozen=True)
class Machine:
    flops: float  # a second, in products of the computing type
    bandwidth: float  # bytes a second, read and written


def memory_rate(device: torch.device) -> float:
    """Bytes read and written in a second where numbers that no cache holds are changed in place."""
    numbers = torch.randn(2**26, device=device)
    rates = []
    for _ in range(10):
        started = now()
        numbers.neg_()
        rates.append(2 * numbers.nbytes / (now() - started))
    return max(rates)


def kind_of(operation: str) -> str:
    if "::" not in operation:
        return PYTHON  # of autograd's functions
    name = operation.split("::")[1]
    for kind, names in KINDS.items():
        if name in names or (kind == ATTENTION and name.startswith("_scaled_dot_product")):
            return kind
    return OTHER


def spent(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds of `work` by kind, and what it returns."""
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        found = work()
    whole = time.perf_counter() - started
    kinds = dict.fromkeys((PRODUCTS, ATTENTION, ADAM, OTHER, PYTHON), 0.0)
    for event in profiler.key_averages():
        kinds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    kinds[PYTHON] += max(0.0, whole - sum(kinds.values()))
    return kinds, found


def least_of_rollout(actors: Actors, rollout: Rollout, machine: Machine) -> dict[str, float]:
    """A step of generation computes for each row and reads every weight once, whichever takes longer."""
    flops = actors.roles.flops("policy")
    tokens = rollout.work()[1]
    written = flops.forward(tokens, tokens)
    read = 2 * (flops.trunk + flops.head) * rollout.response_mask.shape[1]
    passes = (actors.rollout_flops(rollout) - written) / machine.flops
    return {PRODUCTS: passes + max(written / machine.flops, read / machine.bandwidth)}


def least_of_update(actors: Actors, rollout: Rollout, epochs: int, steps: int, machine: Machine):
    trained = sum(p.numel() for p in (*actors.policy_parameters(), *actors.critic_parameters()))
    return {
        PRODUCTS: epochs * actors.update_flops(rollout) / machine.flops,
        ADAM: steps * ADAM_BYTES * trained / machine.bandwidth,
    }


def held(actors: Actors, case: Case) -> dict[str, float]:
    """GiB that cannot be spared: weights of all models, moments, gradients of one network at a time."""
    networks = [[p.numel() for p in own()] for own in (actors.policy_parameters, actors.critic_parameters)]
    trained = sum(map(sum, networks))
    width = 2 if case.bf16 else 4
    flops = actors.roles.flops("policy")
    one = width * (flops.trunk + flops.head)
    parts = {
        "weights that learn, float32": 4 * trained,
        "moments, float32": 8 * trained,
        "gradients, float32": 4 * max(map(sum, networks)),
        "weights in the computing type": one if case.lora else one * (4 if case.bf16 else 2),
    }
    return {name: size / 2**30 for name, size in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    cases = [name for name, case in CASES.items() if isinstance(case, Case)]
    parser.add_argument("case", nargs="?", default="3", choices=cases)
    options = parser.parse_args()
    layout = Layout(Path.cwd())
    case = case_named(options.case)
    assert isinstance(case, Case)
    keep_freed()  # as a stage does
    with tempfile.TemporaryDirectory() as scratch:
        facts = json.loads(write_case(case, 3, layout, Path(scratch)).read_text())
    params = params_of(facts)
    config, device = params.ppo, resolve_device(params.run)
    machine = Machine(matrix_ceiling(resolve_dtype(params.run, device), device), memory_rate(device))
    actors = make_actors(facts, params)
    optimizers = make_optimizers(actors, config)
    rows = facts["conversations"] * case.batch

    def collected(number: int) -> Rollout:
        return collect(actors, rows[number * case.batch : (number + 1) * case.batch], config, number)

    update(actors, *optimizers, collected(0), config, 0)  # to warm up
    started = now()
    update(actors, *optimizers, collected(1), config, 1)
    plain = now() - started
    peak = peak_gib()
    in_rollout, rollout = spent(lambda: collected(2))
    in_update, _ = spent(lambda: update(actors, *optimizers, rollout, config, 2))
    steps = config.num_ppo_epochs * case.minibatches
    least = {
        "rollout": (in_rollout, least_of_rollout(actors, rollout, machine)),
        "update": (in_update, least_of_update(actors, rollout, config.num_ppo_epochs, steps, machine)),
    }
    table = Table("", "spent, s", "least, s", title=f"One batch of PPO: {title_of(case)}")
    whole = 0.0
    for phase, (kinds, floors) in least.items():
        for kind, seconds in kinds.items():
            if seconds >= 0.005:
                floor = floors.get(kind)
                table.add_row(f"{phase}: {kind}", f"{seconds:.2f}", f"{floor:.2f}" if floor else "")
        table.add_section()
        whole += sum(kinds.values())
    table.add_row("all", f"{whole:.2f}", f"{sum(sum(floors.values()) for _, floors in least.values()):.2f}")
    table.caption = (
        f"by torch's profiler; a batch before it took {plain:.2f} s. Least: at {machine.flops / 1e9:.0f} "
        f"GFLOP/s of products and {machine.bandwidth / 1e9:.0f} GB/s of memory, measured just before"
    )
    Console(width=100).print(table)
    memory = held(actors, case)
    Console(width=100).print(
        f"Held at least, GiB: {', '.join(f'{name} {size:.2f}' for name, size in memory.items())}; "
        f"together {sum(memory.values()):.2f} of a peak of {peak:.2f}"
    )


if __name__ == "__main__":
    main()
