"""PPO beside TRL's, the last release of it, in one run: `python -m benchmarks.peers` (`make bench-peers`).

Each engine is a process of its own, TRL in its own environment, on the same model, prompts, lengths, batch,
epochs, optimiser and precision. They alternate, since only ratios mean anything on a shared machine. Needs
models/base and data/prepared (`dvc repro base prepare`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.speed import matrix_ceiling
from rlhf_core.config import load_params
from rlhf_core.data.rows import read_rows
from rlhf_core.errors import InputError
from rlhf_core.layout import Layout
from rlhf_core.modeling.encoding import encode_prompt
from rlhf_core.modeling.loading import load_tokenizer, resolve_device, resolve_dtype

TRL = ("trl==1.12.0", "peft")
ENGINES = Path(__file__).parent / "engines"
Result = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What both engines are asked to do."""

    name: str
    batch: int
    response_length: int
    epochs: int
    minibatches: int
    stop: bool  # whether EOS ends an answer
    lora: bool
    bf16: bool
    prompt_tokens: int = 0  # only prompts of this length; 0 takes any


CASES = {
    "1": Case("full, 24 + 32 tokens, bf16", 16, 32, 1, 1, False, False, True, 24),
    "1f": Case("full, 24 + 32 tokens, float32", 16, 32, 1, 1, False, False, False, 24),
    "2": Case("full, real stopping, 4 x 4", 32, 128, 4, 4, True, False, True),
    "3": Case("LoRA, 24 + 32 tokens, bf16", 16, 32, 1, 1, False, True, True, 24),
}


def environment(directory: Path) -> Path:
    """The Python of TRL's environment, made when it is not there."""
    python = directory / "bin" / "python"
    if not (directory / ".installed").is_file():
        print(f"making {directory} with {TRL[0]} (some minutes, once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q"]
        subprocess.run([*install, "-c", "constraints.txt", *TRL, "transformers", "torch"], check=True)
        (directory / ".installed").touch()
    return python


def write_case(case: Case, batches: int, layout: Layout, directory: Path) -> Path:
    """The case as its engines read it, with prompts drawn from the prepared ones."""
    tokenizer = load_tokenizer(layout.model("base"))
    conversations = [row["messages"] for row in read_rows(layout.prepared_file("prompts", "train"))]
    encoded = [(encode_prompt(tokenizer, messages), messages) for messages in conversations]
    if case.prompt_tokens:
        encoded = [pair for pair in encoded if len(pair[0]) == case.prompt_tokens]
    if not encoded:
        raise InputError(f"no prepared prompt has {case.prompt_tokens} tokens")
    facts = vars(case) | {
        "model": str(layout.model("base").resolve()),
        "prompts": [ids for ids, _ in encoded[:512]],
        "conversations": [messages for _, messages in encoded[:512]],
        "batches": batches,
        "directory": str(directory),
    }
    path = directory / "case.json"
    path.write_text(json.dumps(facts))
    return path


def run(python: Path, engine: str, case: Path) -> Result:
    """One run of an engine. Raises CalledProcessError when it fails."""
    env = os.environ | {"PYTHONPATH": str(Path.cwd()) if engine == "our_ppo" else ""}
    done = subprocess.run(
        [str(python), str(ENGINES / f"{engine}.py"), str(case)], env=env, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout.decode().splitlines()[-1])


def compare(case: Case, options: argparse.Namespace, layout: Layout, peer: Path) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {"trl_ppo": [], "our_ppo": []}
    with tempfile.TemporaryDirectory() as scratch:
        path = write_case(case, options.batches, layout, Path(scratch))
        for _ in range(options.rounds):
            for engine, results in found.items():
                results.append(run(peer if engine == "trl_ppo" else Path(sys.executable), engine, path))
    return found


def add_rows(table: Table, case: Case, found: dict[str, list[Result]], ceiling: float) -> None:
    medians = {}
    for engine, results in found.items():
        seconds = [s for result in results for s in result["seconds"]]
        tokens = [n for result in results for n in result["tokens"]]
        # Per response token where answers may end, for then the engines write answers of different lengths.
        medians[engine] = statistics.median(seconds) / (statistics.mean(tokens) if case.stop else 1.0)
        ratio = medians["trl_ppo"] / medians[engine]
        phases = {name: statistics.mean(r["phases"][name] for r in results) for name in results[0]["phases"]}
        share = results[-1].get("flops", 0.0) / statistics.median(seconds) / ceiling
        table.add_row(
            case.name,
            {"trl_ppo": "TRL 1.12.0", "our_ppo": "this project"}[engine],
            f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})",
            f"{case.batch / statistics.median(seconds):.2f}",
            f"{statistics.mean(tokens) / case.batch:.0f}",
            f"{ratio:.2f}",
            f"{max(result['peak_gib'] for result in results):.1f}",
            f"{share:.0%}" if share else "",
            ", ".join(f"{name} {spent:.1f}" for name, spent in phases.items()),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--batches", type=int, default=2, help="measured in each run, after one to warm up")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each engine")
    parser.add_argument("--environment", type=Path, default=Path(".rlhf/venv-trl"))
    options = parser.parse_args()
    layout = Layout(Path.cwd())
    peer = environment(options.environment.resolve())
    params = load_params(layout.params)
    device = resolve_device(params.run)
    table = Table(title="PPO, one batch: rollout and update")
    columns = ("case", "engine", "seconds (range)", "episodes/s", "tokens an answer", "ratio", "peak GiB")
    for column in (*columns, "share of ceiling", "seconds by phase"):
        table.add_column(column)
    for name in options.cases:
        case = CASES[name]
        precision = "auto" if case.bf16 else "float32"
        run_config = params.run.model_copy(update={"precision": precision})
        ceiling = matrix_ceiling(resolve_dtype(run_config, device), device)
        add_rows(table, case, compare(case, options, layout, peer), ceiling)
        Console(width=200).print(table)


if __name__ == "__main__":
    main()
