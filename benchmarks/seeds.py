"""What training reaches over several seeds: `python -m benchmarks.seeds 0 1 2` prints the table of
docs/results.md.

Each seed runs the whole default pipeline in a clone of HEAD of its own, one after another, about a quarter
of an hour each; a seed that has finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlhf_core.stages import STAGES

Metrics = dict[str, Any]


def run_seed(directory: Path, seed: int) -> None:
    """Run the pipeline with `seed` in a clone; raises CalledProcessError when it fails."""
    if (directory / "reports" / "evaluate" / "metrics.json").is_file():
        return
    if not directory.exists():
        subprocess.run(["git", "clone", "-q", str(Path.cwd()), str(directory)], check=True)
    env = os.environ | {"PYTHONPATH": str(directory)}  # the clone's code, not that of this checkout
    command = [sys.executable, "-m", "rlhf_core.cli", "run", "-S", f"run.seed={seed}"]
    subprocess.run(command, cwd=directory, env=env, check=True)


def read_seed(directory: Path) -> Metrics:
    """All metrics of a finished run, its seconds and its largest stage in GiB."""
    found: Metrics = {}
    seconds, peak = 0.0, 0.0
    for stage in STAGES:
        found |= json.loads((directory / "reports" / stage / "metrics.json").read_text())
        perf = json.loads((directory / ".rlhf" / "runs" / stage / "perf.json").read_text())
        seconds += perf["perf/seconds"]
        peak = max(peak, perf["perf/peak_memory_gib"])
    return found | {"minutes": seconds / 60, "peak": peak}


def interval(found: Metrics, name: str, digits: int = 2, sign: str = "") -> str:
    low, high = found[f"{name}_low"], found[f"{name}_high"]
    return f"{found[name]:{sign}.{digits}f} ({low:{sign}.{digits}f} to {high:{sign}.{digits}f})"


def table(runs: dict[int, Metrics]) -> str:
    """Markdown: one column a seed."""
    rows = {
        "reward model: accuracy on held-out pairs": lambda m: interval(m, "reward/accuracy", 3),
        "... held-out pairs": lambda m: str(m["reward/num_eval_pairs"]),
        "... by length alone": lambda m: f"{m['reward/length_baseline_accuracy']:.3f}",
        "gold reward, base": lambda m: interval(m, "eval/gold_base"),
        "gold reward, SFT": lambda m: interval(m, "eval/gold_sft"),
        "gold reward, policy": lambda m: interval(m, "eval/gold_policy"),
        "... policy less SFT, paired": lambda m: interval(m, "eval/gold_gain_over_sft", sign="+"),
        "... policy less base, paired": lambda m: interval(m, "eval/gold_gain_over_base", sign="+"),
        "proxy reward, policy less SFT, paired": lambda m: interval(m, "eval/proxy_gain_over_sft", sign="+"),
        "win rate over SFT": lambda m: interval(m, "eval/win_rate_over_sft"),
        "KL to SFT, nats per answer": lambda m: interval(m, "eval/kl", 1),
        "tokens per answer, SFT to policy": lambda m: (
            f"{m['eval/length_sft']:.1f} to {m['eval/length_policy']:.1f}"
        ),
        "answers that end, SFT to policy": lambda m: (
            f"{m['eval/eos_rate_sft']:.0%} to {m['eval/eos_rate_policy']:.0%}"
        ),
        "distinct word pairs, SFT to policy": lambda m: (
            f"{m['eval/distinct_2_sft']:.0%} to {m['eval/distinct_2_policy']:.0%}"
        ),
        "minutes in stages; peak GiB of a stage": lambda m: f"{m['minutes']:.1f}; {m['peak']:.1f}",
    }
    lines = ["| | " + " | ".join(f"seed {seed}" for seed in runs) + " |", "| --- |" + " --- |" * len(runs)]
    for name, cell in rows.items():
        lines.append(f"| {name} | " + " | ".join(cell(found) for found in runs.values()) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--directory", type=Path, default=Path(".rlhf/seeds"), help="holds a clone a seed")
    options = parser.parse_args()
    runs = {}
    for seed in options.seeds:
        directory = options.directory.resolve() / f"seed{seed}"
        run_seed(directory, seed)
        runs[seed] = read_seed(directory)
    print(table(runs))


if __name__ == "__main__":
    main()
