"""Where a run's time goes: `python -m benchmarks.default_run` (`rlhf bench run`).

One whole run in a clone of HEAD. DVC and the stages are processes of their own: their times are read off from
outside, those within a stage from what it tells. Work is training, sampling and scoring; everything else is
overhead: starting, loading, saving, the stages that only prepare and check, DVC, Prefect and MLflow.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from rlhf_core.stages import STAGES

EVERY = 0.2  # seconds between two looks at the processes
WORKING = ("pretrain", "sft", "preferences", "reward", "ppo", "evaluate")
COLUMNS = ("DVC", "starting", "loading", "work", "saving")


@dataclass
class Spans:
    """First and last moment at which each process was seen, by what it does."""

    seen: dict[str, tuple[float, float]] = field(default_factory=dict)

    def look(self, root: psutil.Process) -> None:
        for process in root.children(recursive=True):
            try:
                name, begun = role_of(process.cmdline()), process.create_time()
            except psutil.Error:
                continue
            if name:
                self.seen[name] = min(begun, self.seen.get(name, (begun, 0))[0]), time.time()

    def seconds(self, name: str) -> float:
        begun, ended = self.seen.get(name, (0.0, 0.0))
        return ended - begun


def role_of(command: list[str]) -> str:
    """`dvc STAGE` or `stage STAGE`; empty for another process."""
    if "repro" in command and command[-1] in STAGES:
        return f"dvc {command[-1]}"
    if command[-1:] and command[-1] in STAGES and Path(command[-2]).name == "rlhf":
        return f"stage {command[-1]}"
    return ""


def run(directory: Path, options: list[str]) -> tuple[float, Spans]:
    """Seconds of the whole run in the checkout `directory`. Raises CalledProcessError when it fails."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "RLHF_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "rlhf_core.cli", "run", *options]
    spans, started = Spans(), time.time()
    process = subprocess.Popen(
        command, cwd=directory, env=clean | {"PATH": path, "PYTHONPATH": str(directory)}, stdout=sys.stderr
    )
    while process.poll() is None:
        spans.look(psutil.Process(process.pid))
        time.sleep(EVERY)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.time() - started, spans


def parts_of(stage: str, spans: Spans, perf: dict[str, float]) -> dict[str, float]:
    """Seconds of a stage by `COLUMNS`."""
    whole, around = spans.seconds(f"dvc {stage}"), spans.seconds(f"stage {stage}")
    loading, saving = perf.get("perf/loading_seconds", 0.0), perf.get("perf/saving_seconds", 0.0)
    work = max(0.0, perf.get("perf/seconds", 0.0) - loading - saving)
    starting = max(0.0, around - work - loading - saving)  # the end of the process too
    return dict(zip(COLUMNS, (max(0.0, whole - around), starting, loading, work, saving), strict=True))


def table_of(directory: Path, seconds: float, spans: Spans) -> Table:
    table = Table("stage", *COLUMNS, "all", title="Seconds of a run")
    total = dict.fromkeys(COLUMNS, 0.0)
    work = 0.0
    for stage in STAGES:
        file = directory / ".rlhf" / "runs" / stage / "perf.json"
        parts = parts_of(stage, spans, json.loads(file.read_text()) if file.is_file() else {})
        work += parts["work"] if stage in WORKING else 0.0
        total = {name: total[name] + parts[name] for name in COLUMNS}
        table.add_row(stage, *(f"{part:.1f}" for part in parts.values()), f"{sum(parts.values()):.1f}")
    table.add_section()
    table.add_row("stages", *(f"{part:.1f}" for part in total.values()), f"{sum(total.values()):.1f}")
    begun = [begin for begin, _ in spans.seen.values()]
    ended = [end for _, end in spans.seen.values()]
    between = max(ended) - min(begun) - sum(total.values())
    blank = [""] * len(COLUMNS)
    table.add_row("between stages", *blank, f"{between:.1f}")
    table.add_row("before and after", *blank, f"{seconds - (max(ended) - min(begun)):.1f}")
    table.add_row("whole run", *blank, f"{seconds:.1f}")
    table.caption = (
        f"overhead: {seconds - work:.0f} s, {1 - work / seconds:.1%}; it counts all of "
        + ", ".join(stage for stage in STAGES if stage not in WORKING)
    )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where to clone to, and to leave the run")
    parser.add_argument("options", nargs="*", help="of `rlhf run`, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = (options.directory or Path(scratch) / "clone").resolve()
        subprocess.run(["git", "clone", "-q", str(Path.cwd()), str(directory)], check=True)
        seconds, spans = run(directory, options.options)
        Console(width=110).print(table_of(directory, seconds, spans))


if __name__ == "__main__":
    main()
