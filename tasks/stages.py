"""Run one stage through DVC, and tell a failure that is worth another try from one that is not."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.logging import get_run_logger

from rlhf_core.cli import PARENT_DEATH_VARIABLE, QUIET
from rlhf_core.config import Params
from rlhf_core.data.own_files import link_files
from rlhf_core.errors import RLHFError
from rlhf_core.layout import Layout
from rlhf_core.mlflow_writer import SWITCH_VARIABLE, MlflowWriter
from rlhf_core.tracking_spool import SpoolFollower
from tasks import shown, worktrees
from tasks.processes import Finished, run_command
from tasks.registry import ParentRun
from tasks.shown import read_object


class StageError(RLHFError):
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
    root: Path,
    stage: str,
    params: Params,
    parent: ParentRun | None = None,
    kept: Path | None = None,
    again: bool = False,
) -> StageResult:
    """Run `stage` by `dvc repro --single-item` in the workspace `root`.

    A workspace that will be removed leaves its log and report page below `kept`. The log of a stage that is
    taken up `again` goes on where it ended.

    Raises StageError with the stage's own message when it fails.
    """
    layout = Layout(root)
    log_file = layout.run_dir(stage) / "output.log"
    (layout.run_dir(stage) / "failure.json").unlink(missing_ok=True)
    if stage == "prepare":
        link_files(params.data, layout)  # DVC compares them before it runs the stage
    showing = shown.Showing(stage, layout)
    thinned = shown.ThinnedLog(get_run_logger().info)
    tracking = SpoolFollower(
        layout.run_dir(stage),
        lambda values: MlflowWriter(stage, root, values, parent.run_id if parent else ""),
    )

    def on_tick() -> None:
        showing.update()
        tracking.update()

    succeeded = False
    try:
        done = run_command(
            [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage],
            cwd=root,
            env=stage_environment(root, params),
            on_line=thinned.line,
            log_file=log_file,
            time_limit=params.flow.stage_time_limit,
            on_tick=on_tick,
            append=again,
        )
        succeeded = not done.timed_out and done.returncode == 0
    finally:
        thinned.finish()
        tracking.finish(log_file)
        if kept is not None:
            worktrees.keep_stage(layout, Layout(kept), stage)
        page = _run_page(stage, layout, parent)
        at = layout if kept is None else Layout(kept)
        log_page = f"{page}/artifacts/{log_file.name}" if page else ""
        showing.harmless(lambda: shown.show_log(stage, at.run_dir(stage) / log_file.name, log_page))
    showing.finish(succeeded)
    if not succeeded:
        raise stage_error(stage, done, layout, params)
    cached = "didn't change, skipping" in done.tail or "is cached" in done.tail
    result = StageResult(stage, cached, read_object(layout.metrics(stage)))
    showing.harmless(lambda: shown.show_result(stage, result.metrics, cached, at, page))
    return result


def _run_page(stage: str, layout: Layout, parent: ParentRun | None) -> str:
    """The page in MLflow of the stage's run below `parent`; empty when it has none."""
    known = read_object(layout.run_dir(stage) / "mlflow.json")
    if parent is None or known.get("parent") != parent.run_id:
        return ""
    return shown.mlflow_page(parent.uri, parent.experiment, known["run"])


def stage_environment(root: Path, params: Params) -> dict[str, str]:
    """This process's environment with telemetry off, the hub off unless named, tracking left to us, our
    programs first on PATH, and the code of `root`."""
    bin_dir = str(Path(sys.executable).parent)
    env = {**QUIET, **os.environ, "PATH": f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    sources = (*params.data.demonstrations, *params.data.preferences, *params.data.prompts)
    if params.model.source != "hub" and not any(source.startswith("hub:") for source in sources):
        env["HF_HUB_OFFLINE"] = "1"
    env[PARENT_DEATH_VARIABLE] = str(os.getpid())
    env.setdefault(SWITCH_VARIABLE, "spool")
    return env


def stage_error(stage: str, done: Finished, layout: Layout, params: Params) -> StageError:
    """What a person should read: the stage's own words, or the last lines it printed."""
    if done.timed_out:
        limit = params.flow.stage_time_limit
        return StageError(f"{stage}: stopped after {limit} s (flow.stage_time_limit)", retryable=False)
    failure = read_object(layout.run_dir(stage) / "failure.json")
    if failure:
        return StageError(f"{stage}: {failure['message']}", retryable=failure["exit_code"] == 1)
    return StageError(f"{stage}: ended with status {done.returncode}:\n{done.tail}", retryable=True)
