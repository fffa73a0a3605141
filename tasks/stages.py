"""Run one stage through DVC, and show in Prefect what it does and what came out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.events import emit_event
from prefect.logging import get_run_logger

from rlhf_core.cli import PARENT_DEATH_VARIABLE, QUIET
from rlhf_core.config import Params
from rlhf_core.layout import Layout
from rlhf_core.mlflow_writer import SWITCH_VARIABLE, MlflowWriter
from rlhf_core.tracking_spool import SpoolFollower
from tasks import worktrees
from tasks.processes import Finished, run_command


class StageError(RuntimeError):
    """A stage failed; `retryable` says whether trying again can help."""

    def __init__(self, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


@dataclass(frozen=True)
class StageResult:
    """What a stage ended with."""

    stage: str
    cached: bool  # DVC found nothing to do
    metrics: dict[str, Any]


def run_stage(
    root: Path, stage: str, params: Params, parent_run_id: str = "", kept: Path | None = None
) -> StageResult:
    """Run `stage` by `dvc repro --single-item` in the workspace `root`.

    A workspace that will be removed leaves its log and report page below `kept`.

    Raises StageError with the stage's own message when it fails.
    """
    layout = Layout(root)
    logger = get_run_logger()
    (layout.run_dir(stage) / "failure.json").unlink(missing_ok=True)
    progress = Progress(stage, layout)
    alarms = Alarms(stage, layout)
    tracking = SpoolFollower(
        layout.run_dir(stage), lambda values: MlflowWriter(stage, root, values, parent_run_id)
    )

    def on_tick() -> None:
        progress.update()
        alarms.update()
        tracking.update()

    try:
        done = run_command(
            [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage],
            cwd=root,
            env=stage_environment(root, params),
            on_line=logger.info,
            log_file=layout.run_dir(stage) / "output.log",
            time_limit=params.flow.stage_time_limit,
            on_tick=on_tick,
        )
    finally:
        tracking.finish()
        if kept is not None:
            worktrees.keep_stage(layout, Layout(kept), stage)
    if done.timed_out or done.returncode != 0:
        raise stage_error(stage, done, layout, params)
    progress.finish()
    cached = "didn't change, skipping" in done.tail or "is cached" in done.tail
    result = StageResult(stage, cached, _read(layout.metrics(stage)))
    show(result, layout if kept is None else Layout(kept))
    return result


def stage_environment(root: Path, params: Params) -> dict[str, str]:
    """This process's environment with telemetry off, the hub off unless named, tracking left to us, our
    programs first on PATH, and the code of `root`."""
    bin_dir = str(Path(sys.executable).parent)
    env = {**QUIET, **os.environ, "PATH": f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    sources = (*params.data.demonstrations, *params.data.preferences, *params.data.prompts)
    if params.model.source != "hub" and not any(source.startswith("hub:") for source in sources):
        env["HF_HUB_OFFLINE"] = "1"
    env[PARENT_DEATH_VARIABLE] = "1"
    env.setdefault(SWITCH_VARIABLE, "spool")
    return env


def stage_error(stage: str, done: Finished, layout: Layout, params: Params) -> StageError:
    """What a person should read: the stage's own words, or the last lines it printed."""
    if done.timed_out:
        limit = params.flow.stage_time_limit
        return StageError(f"{stage}: stopped after {limit} s (flow.stage_time_limit)", retryable=False)
    failure = _read(layout.run_dir(stage) / "failure.json")
    if failure:
        return StageError(f"{stage}: {failure['message']}", retryable=failure["exit_code"] == 1)
    return StageError(f"{stage}: ended with status {done.returncode}:\n{done.tail}", retryable=True)


class Progress:
    """A progress artifact that follows .rlhf/runs/STAGE/progress.json."""

    def __init__(self, stage: str, layout: Layout) -> None:
        self._stage = stage
        self._file = layout.run_dir(stage) / "progress.json"
        self._file.unlink(missing_ok=True)
        self._artifact: Any = None
        self._shown = -1.0

    def update(self) -> None:
        state = _read(self._file)
        if state.get("total"):
            self._show(100.0 * state["done"] / state["total"])

    def finish(self) -> None:
        self._show(100.0)

    def _show(self, percent: float) -> None:
        if (percent - self._shown < 5.0 and percent < 100.0) or percent == self._shown:
            return
        self._shown = percent
        if self._artifact is None:
            self._artifact = create_progress_artifact(
                percent, key=f"{self._stage}-progress", description=f"Progress of {self._stage}"
            )
        else:
            update_progress_artifact(self._artifact, percent)


class Alarms:
    """An event `rlhf.warning.NAME` for each warning in .rlhf/runs/STAGE/warnings.json, for automations."""

    def __init__(self, stage: str, layout: Layout) -> None:
        self._stage = stage
        self._file = layout.run_dir(stage) / "warnings.json"
        self._file.unlink(missing_ok=True)
        self._sent: set[str] = set()

    def update(self) -> None:
        for name, text in _read(self._file).items():
            if name not in self._sent:
                self._sent.add(name)
                emit_event(
                    f"rlhf.warning.{name}",
                    resource={"prefect.resource.id": f"rlhf.stage.{self._stage}"},
                    payload={"stage": self._stage, "warning": text},
                )


def show(result: StageResult, layout: Layout) -> None:
    """The stage's numbers and sample rows as artifacts."""
    rows = [{"metric": name, "value": value} for name, value in result.metrics.items()]
    note = "taken from the cache" if result.cached else "computed"
    create_table_artifact(rows, key=f"{result.stage}-metrics", description=f"{result.stage}, {note}")
    for path in sorted(layout.run_dir(result.stage).glob("*.table.json")):
        key = f"{result.stage}-{path.name.removesuffix('.table.json').replace('_', '-')}"
        create_table_artifact(_read_list(path), key=key, description=f"Rows shown by {result.stage}")
    log = layout.run_dir(result.stage) / "output.log"
    create_link_artifact(log.resolve().as_uri(), link_text="the whole log", key=f"{result.stage}-log")
    report = {"validate": layout.validation / "index.html", "evaluate": layout.evaluation / "report.html"}
    if (page := report.get(result.stage)) and page.is_file():
        create_link_artifact(
            page.resolve().as_uri(), link_text=f"{result.stage} report", key=f"{result.stage}-report"
        )


def show_links(root: Path, tracking_uri: str, run_id: str, experiment: str) -> None:
    """Where the run lies in MLflow."""
    if tracking_uri.startswith("http"):
        create_link_artifact(
            f"{tracking_uri}/#/experiments/{experiment}/runs/{run_id}",
            key="mlflow-run",
            link_text="MLflow run",
        )
    else:
        text = f"MLflow run `{run_id}` in `{tracking_uri}`; `make up` shows it in a browser."
        create_markdown_artifact(text, key="mlflow-run", description="Where this run is tracked")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _read_list(path: Path) -> list[Mapping[str, Any]]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
