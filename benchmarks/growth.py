"""Whether cost grows as the arithmetic does: `python -m benchmarks.growth` (`rlhf bench growth`).

Time and memory of passes with LoRA over longer rows and larger batches, then of PPO on a model some four
times as large, with random weights. Each is a process of its own, so that its peak of memory is its own.
Needs models/base and data/prepared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.clock import peak_gib
from benchmarks.peers import Case, case_named, run, write_case
from benchmarks.speed import matrix_ceiling, measure
from rlhf_core.allocator import keep_freed
from rlhf_core.config import load_params
from rlhf_core.layout import Layout
from rlhf_core.modeling.loading import load_policy, load_tokenizer

ROWS = ((4, 256), (16, 256), (1, 1024), (1, 4096))
SCALE = 2  # of width and heads: four times the weights of each block


def passes(rows: int, length: int, repeats: int) -> dict[str, Any]:
    """Median seconds, FLOPs and the ceiling's FLOP/s of one size; what memory it took beyond the model's."""
    import torch

    from rlhf_core.modeling.encoding import make_batch
    from rlhf_core.modeling.flops import Flops
    from rlhf_core.modeling.roles import AdapterRoles

    keep_freed()  # as a stage does
    params = load_params(Layout(Path.cwd()).params)
    model, tokenizer = load_policy(Layout(Path.cwd()).model("base"), params.run)
    flops = Flops.of(model, "lora")
    roles = AdapterRoles(model, tokenizer, params.model.lora)
    roles.add("policy", seed=0)
    batch = make_batch(
        [[5 + i] for i in range(rows)],
        [[7] * (length - 1)] * rows,
        tokenizer.pad_token_id,
        model.device,
    )
    ceiling = matrix_ceiling(model.dtype, model.device)
    before = _peak()

    def forward() -> None:
        with torch.no_grad():
            roles.hidden("policy", *batch.inputs)

    def training() -> None:
        roles.hidden("policy", *batch.inputs).float().sum().backward()

    found: dict[str, Any] = {"ceiling": ceiling}
    for name, need in (("forward", flops.forward), ("training", flops.training)):
        attention = rows * flops.attention(length, training=name == "training")
        seconds = measure({name: forward if name == "forward" else training}, repeats)[name]
        grown = _peak() - before
        found[name] = {
            "seconds": statistics.median(seconds),
            "flops": need(rows * length) + attention,
            "kib_a_token": grown / (rows * length),
        }
    return found


def _peak() -> int:
    return int(2**20 * peak_gib())  # KiB


def growth_of_passes(repeats: int) -> Table:
    table = Table(title="Passes through the trunk with LoRA, by token")
    columns = ("rows x tokens", "pass", "ms", "times", "arithmetic, times", "KiB", "share of ceiling")
    for column in columns:
        table.add_column(column)
    first: dict[str, tuple[float, float]] = {}  # seconds and operations a token, of each pass
    for rows, length in ROWS:
        command = [sys.executable, "-m", "benchmarks.growth", "--one", str(rows), str(length)]
        done = subprocess.run([*command, "--repeats", str(repeats)], stdout=subprocess.PIPE, check=True)
        found = json.loads(done.stdout.decode().splitlines()[-1])
        for name in ("forward", "training"):
            one = found[name]
            seconds, flops = one["seconds"] / (rows * length), one["flops"] / (rows * length)
            base = first.setdefault(name, (seconds, flops))
            table.add_row(
                f"{rows} x {length}",
                name,
                f"{1000 * seconds:.2f}",
                f"{seconds / base[0]:.2f}",
                f"{flops / base[1]:.2f}",
                f"{one['kib_a_token']:.0f}",
                f"{flops / seconds / found['ceiling']:.0%}",
            )
    return table


def larger_model(base: Path, directory: Path) -> Path:
    """A model of the base's kind, `SCALE` times as wide, with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(config, name, SCALE * getattr(config, name))
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    load_tokenizer(base).save_pretrained(directory)
    return directory


def growth_of_ppo(layout: Layout, batches: int) -> Table:
    """The same batch of PPO with LoRA on the base and on a larger model, twice in turn."""
    table = Table(title="PPO with LoRA, 16 episodes of 24 + 32 tokens")
    for column in ("model", "seconds a batch (range)", "times", "arithmetic, times", "peak GiB"):
        table.add_column(column)
    case = case_named("3")
    assert isinstance(case, Case)
    with tempfile.TemporaryDirectory() as scratch:
        path = write_case(case, batches, layout, Path(scratch))
        facts = json.loads(path.read_text())
        large = larger_model(layout.model("base"), Path(scratch) / "model")
        cases = {"base": path, f"{SCALE} times as wide": Path(scratch) / "large.json"}
        cases[f"{SCALE} times as wide"].write_text(json.dumps(facts | {"model": str(large)}))
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
        for _ in range(2):
            for name, own in cases.items():
                found[name].append(run(Path(sys.executable), "our_ppo", own))
    first = found["base"]
    for name, results in found.items():
        seconds = sorted(s for result in results for s in result["seconds"])
        whole = sum(seconds) / sum(s for result in first for s in result["seconds"])
        table.add_row(
            name,
            f"{seconds[len(seconds) // 2]:.1f} ({seconds[0]:.1f} to {seconds[-1]:.1f})",
            f"{whole:.2f}",
            f"{results[0]['flops'] / first[0]['flops']:.2f}",
            f"{max(result['peak_gib'] for result in results):.1f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, default=2, help="of PPO, measured in each run")
    parser.add_argument("--one", nargs=2, type=int, metavar=("ROWS", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(passes(*options.one, options.repeats)))
        return
    layout = Layout(Path.cwd())
    if not layout.model("base").is_dir() or not layout.prepared_file("prompts", "train").is_file():
        sys.exit("models/base or data/prepared is missing: `dvc repro base prepare` makes them")
    Console().print(growth_of_passes(options.repeats))
    Console().print(growth_of_ppo(layout, options.batches))


if __name__ == "__main__":
    main()
