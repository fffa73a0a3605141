"""What a stage reports while it runs: JSON lines always, MLflow when it is on.

The only door through which `rlhf_core` lets its numbers out. MLflow is written by a thread of its own, or by
the flow that started the stage, so its server cannot hold up the training or stop it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rlhf_core.atomic import write_text
from rlhf_core.mlflow_writer import MlflowWriter
from rlhf_core.tracking_spool import SpoolWriter


class Tracker:
    """Collects the metrics, tables and progress of one stage below `run_dir`.

    `run_dir/history.jsonl` holds one object a step and `run_dir/progress.json` how far the stage is;
    both are read by others while the stage runs.
    """

    def __init__(self, stage: str, run_dir: Path, writer: MlflowWriter | SpoolWriter | None = None) -> None:
        self.stage = stage
        self.run_dir = run_dir
        self.history: list[dict[str, float]] = []
        self.perf: dict[str, float] = {}
        self.warnings: dict[str, str] = {}
        self._writer = writer
        self._bar: tqdm | None = None
        self.first_progress = self.last_progress = 0.0  # when, by the monotonic clock; 0 before there was any
        run_dir.mkdir(parents=True, exist_ok=True)
        names = ("history.jsonl", "progress.json", "warnings.json")
        for leftover in (*(run_dir / name for name in names), *run_dir.glob("*.table.json")):
            leftover.unlink(missing_ok=True)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics of one step. Names are `area/name`; values must be the same in a repetition."""
        row = {"step": step, **{name: float(value) for name, value in metrics.items()}}
        self.history.append(row)
        with (self.run_dir / "history.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._writer:
            self._writer.metrics({name: value for name, value in row.items() if name != "step"}, step)

    def log_perf(self, metrics: Mapping[str, float]) -> None:
        """Record times, speeds and memory: shown and tracked, but never part of a reproducible output."""
        self.perf.update({name: float(value) for name, value in metrics.items()})
        if self._writer:
            self._writer.metrics(metrics, 0)

    def final(self, metrics: Mapping[str, float]) -> None:
        """Record what the stage ends with."""
        if self._writer:
            self._writer.metrics(metrics, 0)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record a small table, such as sample texts: run_dir/NAME.table.json."""
        text = json.dumps(list(rows), ensure_ascii=False)
        (self.run_dir / f"{name}.table.json").write_text(text, encoding="utf-8")
        if self._writer and rows:
            self._writer.table(name, rows)

    def warn(self, name: str, text: str) -> None:
        """Warn once of `name`: on stderr, in run_dir/warnings.json, and as a tag in MLflow."""
        if name in self.warnings:
            return
        self.warnings[name] = text
        tqdm.write(f"warning: {self.stage}: {text}", file=sys.stderr)
        write_text(self.run_dir / "warnings.json", json.dumps(self.warnings))
        if self._writer:
            self._writer.tag(f"warning.{name}", text)

    def say(self, text: str) -> None:
        """A line on stderr: what the stage waits for while it has no progress to show."""
        tqdm.write(f"{self.stage}: {text}", file=sys.stderr)

    def artifact(self, path: Path) -> None:
        """Record a file or directory (plot, report)."""
        if self._writer:
            self._writer.artifact(path)

    def dataset(self, name: str, path: Path, context: str) -> None:
        """Record that the stage read the Parquet file `path` for `context` (training, evaluation)."""
        if self._writer:
            self._writer.dataset(name, path, context)

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Show a bar with the time left on stderr, and keep run_dir/progress.json current."""
        if self._bar is None or self._bar.total != total:
            self.close_bar()
            self._bar = tqdm(
                total=total,
                initial=done,  # a training that is taken up again: the time left is from here on
                desc=self.stage,
                file=sys.stderr,
                dynamic_ncols=True,
                mininterval=1.0,
            )
        # A note without a step says what begins now, which may take long: it is shown at once.
        begins = done == self._bar.n and note != (self._bar.postfix or "")
        self._bar.set_postfix_str(note, refresh=begins)
        self._bar.update(done - self._bar.n)
        self.first_progress = self.first_progress or time.monotonic()
        if done >= total or time.monotonic() - self.last_progress > 1.0:
            self.last_progress = time.monotonic()
            state = {"stage": self.stage, "done": done, "total": total, "note": note}
            partial = self.run_dir / "progress.json.partial"
            partial.write_text(json.dumps(state), encoding="utf-8")
            partial.replace(self.run_dir / "progress.json")

    def close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class SilentTracker(Tracker):
    """Of a rank that does not write: keeps the history, which training reads, and nothing else."""

    def __init__(self, stage: str, run_dir: Path) -> None:
        self.stage, self.run_dir = stage, run_dir
        self.history, self.perf, self.warnings = [], {}, {}
        self._writer = self._bar = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.history.append({"step": step, **{name: float(value) for name, value in metrics.items()}})

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        pass

    def warn(self, name: str, text: str) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def progress(self, done: int, total: int, note: str = "") -> None:
        pass
