"""Training beside TRL's, in one run: `python -m benchmarks.peers` (`make bench-peers`).

PPO beside 1.12.0, the last release that has it; SFT and reward model beside 1.16.0. Each engine is a process
of its own, TRL in its own environment, on the same model, rows, lengths, batch, epochs, optimiser and
precision. They alternate, since only ratios mean anything on a shared machine, and the table says how much of
its processors others took meanwhile. Needs models/base and data/prepared (`dvc repro base prepare`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.speed import matrix_ceiling
from rlhf_core.allocator import LARGEST_KEPT
from rlhf_core.config import load_params
from rlhf_core.data.rows import read_rows
from rlhf_core.errors import InputError
from rlhf_core.layout import Layout
from rlhf_core.modeling.encoding import encode_prompt, encode_response
from rlhf_core.modeling.loading import load_tokenizer, resolve_device, resolve_dtype

ENGINES = Path(__file__).parent / "engines"
Result = dict[str, Any]
# What `rlhf_core.allocator` does for our stages, by the C library's own variables.
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(LARGEST_KEPT), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


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
    start: str = "base"  # which of the workspace's models all four begin as

    trl = "1.12.0"
    engines = "trl_ppo", "our_ppo"

    @property
    def per_token(self) -> bool:
        """Whether to compare by token: where answers may end, the engines write answers of other lengths."""
        return self.stop


@dataclass(frozen=True)
class Supervised:
    """What both engines are asked to do, in SFT or the training of a reward model."""

    name: str
    task: str  # sft | reward
    batch: int
    micro_batch: int  # of ours; the peer's is the batch
    packing: bool
    max_length: int = 256
    bf16: bool = True
    start: str = "base"

    trl = "1.16.0"
    engines = "trl_supervised", "our_supervised"
    per_token = True


CASES: dict[str, Case | Supervised] = {
    "1": Case("full, 24 + 32 tokens", 16, 32, 1, 1, False, False, True, 24),
    "1f": Case("full, 24 + 32 tokens", 16, 32, 1, 1, False, False, False, 24),
    "2": Case("full, real stopping, 4 x 4", 32, 128, 4, 4, True, False, True),
    "2s": Case("... from models/sft, which stops", 32, 128, 4, 4, True, False, True, start="sft"),
    "3": Case("LoRA, 24 + 32 tokens", 16, 32, 1, 1, False, True, True, 24),
    "4s": Supervised("SFT, ragged rows", "sft", 16, 16, False),
    "4r": Supervised("reward model, ragged pairs", "reward", 16, 4, False),
}


def case_named(name: str) -> Case | Supervised:
    """The case as this machine computes it: where it has no bfloat16, in float32 for both engines."""
    case, run_config = CASES[name], load_params(Layout(Path.cwd()).params).run
    width = resolve_dtype(run_config.model_copy(update={"precision": "auto"}), resolve_device(run_config))
    return replace(case, bf16=case.bf16 and width.itemsize == 2)


def title_of(case: Case | Supervised) -> str:
    return f"{case.name}, {'bf16' if case.bf16 else 'float32'}"


def environment(directory: Path, version: str) -> Path:
    """The Python of TRL's environment, made when it is not there."""
    directory = directory / f"venv-trl-{version}"
    python = directory / "bin" / "python"
    if not (directory / ".installed").is_file():
        print(f"making {directory} with TRL {version} (some minutes, once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q"]
        subprocess.run(
            [*install, "-c", "constraints.txt", f"trl=={version}", "peft", "transformers", "torch"],
            check=True,
        )
        (directory / ".installed").touch()
    return python


def write_case(case: Case | Supervised, batches: int, layout: Layout, directory: Path) -> Path:
    """The case as its engines read it, with rows drawn from the prepared ones."""
    facts: dict[str, Any] = {"model": str(layout.model(case.start).resolve()), "batches": batches}
    facts |= vars(case) | {"directory": str(directory)}
    facts |= ppo_rows(case, layout) if isinstance(case, Case) else supervised_rows(case, batches, layout)
    path = directory / "case.json"
    path.write_text(json.dumps(facts))
    return path


def ppo_rows(case: Case, layout: Layout) -> dict[str, Any]:
    tokenizer = load_tokenizer(layout.model("base"))
    conversations = [row["messages"] for row in read_rows(layout.prepared_file("prompts", "train"))]
    encoded = [(encode_prompt(tokenizer, messages), messages) for messages in conversations]
    if case.prompt_tokens:
        encoded = [pair for pair in encoded if len(pair[0]) == case.prompt_tokens]
    if not encoded:
        raise InputError(f"no prepared prompt has {case.prompt_tokens} tokens")
    return {
        "prompts": [ids for ids, _ in encoded[:512]],
        "conversations": [messages for _, messages in encoded[:512]],
    }


def supervised_rows(case: Supervised, batches: int, layout: Layout) -> dict[str, Any]:
    """Token ids, and the useful tokens of each batch: real ones, a prompt counted for each of its answers."""
    tokenizer = load_tokenizer(layout.model("base"))
    kind, answers = {
        "sft": ("demonstrations", ["response"]),
        "reward": ("preferences", ["chosen", "rejected"]),
    }[case.task]
    rows = []
    for row in read_rows(layout.prepared_file(kind, "train")):
        encoded = [encode_prompt(tokenizer, row["messages"])]
        encoded += [encode_response(tokenizer, row[name]) for name in answers]
        if len(encoded[0]) + max(map(len, encoded[1:])) <= case.max_length:
            rows.append(encoded)
    rows = rows[: case.batch * (batches + 1)]
    each = [sum(len(row[0]) + len(answer) for answer in row[1:]) for row in rows]
    return {
        "rows": rows,
        "tokens": [sum(each[start : start + case.batch]) for start in range(0, len(each), case.batch)],
    }


def run(python: Path, engine: str, case: Path, variables: Mapping[str, str] = {}) -> Result:
    """One run of an engine. Raises CalledProcessError when it fails."""
    env = os.environ | {"PYTHONPATH": str(Path.cwd()) if engine.startswith("our") else ""} | variables
    began, started = _processor_seconds(), time.monotonic()
    done = subprocess.run(
        [str(python), str(ENGINES / f"{engine}.py"), str(case)], env=env, stdout=subprocess.PIPE, check=True
    )
    others = _processor_seconds() - began
    share = max(0.0, others) / (time.monotonic() - started) / (os.cpu_count() or 1)
    return json.loads(done.stdout.decode().splitlines()[-1]) | {"others": share}


def _processor_seconds() -> float:
    """What the machine's processors have worked so far, less what the ended children of this process did."""
    times, own = psutil.cpu_times(), os.times()
    return times.user + times.nice + times.system - own.children_user - own.children_system


def compare(
    case: Case | Supervised, options: argparse.Namespace, layout: Layout, peer: Path
) -> dict[str, list[Result]]:
    """Results of each engine by what the tables call it, TRL first."""
    theirs, ours = case.engines
    runs: dict[str, tuple[Path, str, Mapping[str, str]]]
    runs = {f"TRL {case.trl}": (peer, theirs, {}), "this project": (Path(sys.executable), ours, {})}
    if options.kept:
        runs[f"TRL {case.trl}, freed memory kept"] = peer, theirs, KEPT
    found: dict[str, list[Result]] = {name: [] for name in runs}
    with tempfile.TemporaryDirectory() as scratch:
        path = write_case(case, options.batches, layout, Path(scratch))
        for _ in range(options.rounds):
            for name, (python, engine, variables) in runs.items():
                found[name].append(run(python, engine, path, variables))
    return found


def add_rows(
    speeds: Table, phases: Table, case: Case | Supervised, found: dict[str, list[Result]], ceiling: float
) -> None:
    medians: dict[str, float] = {}
    for name, results in found.items():
        seconds = [s for result in results for s in result["seconds"]]
        tokens = [n for result in results for n in result["tokens"]]
        median = statistics.median(seconds)
        medians[name] = median / (statistics.mean(tokens) if case.per_token else 1.0)
        flops = statistics.mean(result.get("flops", 0.0) for result in results)  # the peer's are not known
        speeds.add_row(
            title_of(case),
            name,
            f"{median:.1f} ({min(seconds):.1f} to {max(seconds):.1f})",
            f"{statistics.mean(tokens) / median:.0f}",
            f"{next(iter(medians.values())) / medians[name]:.2f}",
            f"{max(result['peak_gib'] for result in results):.1f}",
            f"{flops / median / 1e9:.0f} ({flops / median / ceiling:.0%})" if flops else "",
            f"{flops / ceiling:.1f}" if flops else "",
        )
        spent = {
            phase: statistics.mean(r["phases"][phase] for r in results) for phase in results[0]["phases"]
        }
        said = ", ".join(f"{phase} {length:.1f}" for phase, length in spent.items())
        if "update_flops" in results[-1]:
            share = results[-1]["update_flops"] / spent["update"] / ceiling
            said += f" ({share:.0%} of the ceiling)"
        phases.add_row(title_of(case), name, said, f"{max(result['others'] for result in results):.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--batches", type=int, default=2, help="measured in each run, after one to warm up")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each engine")
    parser.add_argument("--kept", action="store_true", help="TRL also with freed memory kept")
    parser.add_argument("--environments", type=Path, default=Path(".rlhf"), help="where TRL is installed")
    options = parser.parse_args()
    layout = Layout(Path.cwd())
    params = load_params(layout.params)
    device = resolve_device(params.run)
    speeds = Table(
        "case", "engine", "seconds (range)", "tokens/s", "ratio", "peak GiB", "GFLOP/s", "floor, s"
    )
    speeds.title = "One batch; tokens of answers in PPO, of prompts and answers elsewhere"
    phases = Table("case", "engine", "seconds by phase", "other work here")
    for name in options.cases:
        case = case_named(name)
        if not layout.model(case.start).is_dir():
            print(f"left out: case {name}, which needs models/{case.start}", file=sys.stderr)
            continue
        peer = environment(options.environments.resolve(), case.trl)
        precision = "auto" if case.bf16 else "float32"
        run_config = params.run.model_copy(update={"precision": precision})
        ceiling = matrix_ceiling(resolve_dtype(run_config, device), device)
        add_rows(speeds, phases, case, compare(case, options, layout, peer), ceiling)
        speeds.caption = (
            f"floor: the operations of a batch at {ceiling / 1e9:.0f} GFLOP/s, the best of many products "
            "measured before the last case"
        )
        for table in (speeds, phases):
            Console(width=120).print(table)


if __name__ == "__main__":
    main()
