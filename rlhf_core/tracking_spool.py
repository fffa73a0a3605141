"""What a stage tracks, as lines in a file, for the flow that started it to hand on to MLflow.

Importing MLflow costs a process about as much as importing torch. The flow has it loaded already, so under a
flow a stage writes down what it would tell MLflow, and the flow, which follows the stage anyway, tells it. A
stage that is killed cannot close its run; the flow that sees it die can.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.mlflow_writer import MlflowWriter, TimedMetric, timed

FILE_NAME = "tracking.jsonl"


class SpoolWriter:
    """Has the methods of MlflowWriter; each call becomes one line of RUN_DIR/tracking.jsonl."""

    def __init__(self, run_dir: Path, params: Mapping[str, Any]) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = (run_dir / FILE_NAME).open("w", encoding="utf-8")
        self._put("params", {key: str(value) for key, value in params.items()})

    def metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._put("metrics", timed(metrics, step))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self._put("table", name, list(rows))

    def tag(self, name: str, value: str) -> None:
        self._put("tag", name, value)

    def artifact(self, path: Path) -> None:
        self._put("artifact", str(path))

    def dataset(self, name: str, path: Path, context: str) -> None:
        self._put("dataset", name, str(path), context)

    def close(self, status: str) -> None:
        self._put("close", status)
        self._file.close()

    def _put(self, call: str, *arguments: object) -> None:
        self._file.write(json.dumps([call, *arguments], ensure_ascii=False) + "\n")
        self._file.flush()  # into the kernel: a killed process loses nothing


class SpoolFollower:
    """Hands a stage's lines on to the MlflowWriter that `make_writer` opens on the first of them.

    A stage that DVC takes from its cache writes none, and gets no run.
    """

    def __init__(self, run_dir: Path, make_writer: Callable[[Mapping[str, Any]], MlflowWriter]) -> None:
        self._path = run_dir / FILE_NAME
        self._path.unlink(missing_ok=True)
        self._make_writer = make_writer
        self._writer: MlflowWriter | None = None
        self._status: str | None = None
        self._position = 0

    def update(self) -> None:
        """Hand on all whole lines that are new."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                *lines, _unfinished = file.read().split(b"\n")
        except FileNotFoundError:
            return
        self._position += sum(len(line) + 1 for line in lines)
        for line in lines:
            self._hand_on(*json.loads(line))

    def finish(self, *files: Path) -> None:
        """Hand on the rest and `files`, close the run; a stage that did not say how it ended was killed."""
        self.update()
        if self._writer is not None:
            for file in files:
                self._writer.artifact(file)
            self._writer.close(self._status or "KILLED")

    def _hand_on(self, call: str, *arguments: Any) -> None:
        if call == "params":
            self._writer = self._make_writer(*arguments)
        writer = self._writer
        assert writer is not None  # parameters come first
        if call == "metrics":
            writer.timed_metrics([TimedMetric(*entry) for entry in arguments[0]])
        elif call == "table":
            writer.table(*arguments)
        elif call == "tag":
            writer.tag(*arguments)
        elif call == "artifact":
            writer.artifact(Path(arguments[0]))
        elif call == "dataset":
            name, path, context = arguments
            writer.dataset(name, Path(path), context)
        elif call == "close":
            self._status = arguments[0]
