"""Run one stage: tracked, timed, its metrics written last."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psutil

from rlhf_core import collector, ranks
from rlhf_core.atomic import write_text
from rlhf_core.config import Params, flatten
from rlhf_core.errors import RLHFError
from rlhf_core.layout import Layout
from rlhf_core.mlflow_writer import SWITCH_VARIABLE, MlflowWriter
from rlhf_core.modeling.loading import precision_warning
from rlhf_core.tracking import SilentTracker, Tracker
from rlhf_core.tracking_spool import SpoolWriter

COMPUTING = "pretrain", "sft", "preferences", "reward", "ppo", "evaluate"
SECTIONS = {"base": "model", "prepare": "data", "validate": "validate_"}  # the others are named as the stage


def run_stage(stage: str, params: Params, layout: Layout) -> dict[str, float]:
    """Run `stage` in the workspace; return its metrics.

    On success reports/STAGE/metrics.json (and history.csv where the stage logs steps) are written last;
    on failure .rlhf/runs/STAGE/failure.json says why, for the task that watches.
    """
    with collector.paused():
        module = importlib.import_module(f"rlhf_core.stages.{stage}")
    if ranks.count() > 1:
        from rlhf_core.modeling.loading import resolve_device

        ranks.join(resolve_device(params.run))
    if not ranks.is_first():
        with ranks.together():
            return module.run(params, layout, SilentTracker(stage, layout.run_dir(stage)))
    run_dir = layout.run_dir(stage)
    (run_dir / "failure.json").unlink(missing_ok=True)
    starting = time.time() - psutil.Process().create_time()
    started = time.monotonic()
    with open_tracker(stage, params, layout) as tracker, ranks.together():
        if stage in COMPUTING and (warning := precision_warning(params.run)):
            tracker.warn("precision", warning)
        metrics = module.run(params, layout, tracker)
        if tracker.history:
            write_text(layout.history(stage), history_csv(tracker.history))
        write_text(layout.metrics(stage), json.dumps(round_metrics(metrics), indent=2) + "\n")
        tracker.log_perf({"perf/seconds": time.monotonic() - started} | peak_memory())
        tracker.log_perf({"perf/starting_seconds": starting} | around_work(tracker, started))
        tracker.log_perf({"perf/num_processes": ranks.count()})
        tracker.final(metrics)
        write_text(run_dir / "perf.json", json.dumps(tracker.perf, indent=2))
    return metrics


def peak_memory() -> dict[str, float]:
    """Of this process: main memory, and a GPU's where one was used."""
    found = {"perf/peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}  # from KiB
    torch = sys.modules.get("torch")  # most stages that need none do not load it
    if torch is not None and torch.cuda.is_initialized():
        found["perf/peak_gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def around_work(tracker: Tracker, started: float) -> dict[str, float]:
    """Seconds before the first progress of a stage that `started` (monotonic) then, and after the last."""
    if not tracker.first_progress:
        return {}
    return {
        "perf/loading_seconds": tracker.first_progress - started,
        "perf/saving_seconds": time.monotonic() - tracker.last_progress,
    }


@contextmanager
def open_tracker(stage: str, params: Params, layout: Layout) -> Iterator[Tracker]:
    """A tracker that ends its MLflow run truly, whatever ends the block."""
    tracker = Tracker(stage, layout.run_dir(stage), writer := open_writer(stage, params, layout))
    status = "FINISHED"
    try:
        yield tracker
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        if isinstance(error, RLHFError):
            failure = {"kind": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
            write_text(layout.run_dir(stage) / "failure.json", json.dumps(failure))
        raise
    finally:
        tracker.close_bar()
        if writer is not None:
            writer.close(status)


def open_writer(stage: str, params: Params, layout: Layout) -> MlflowWriter | SpoolWriter | None:
    """Where the tracker sends what it is told: to MLflow, to the flow that started us, or nowhere."""
    switch = os.environ.get(SWITCH_VARIABLE, "")
    if switch == "off":
        return None
    if switch == "spool":
        return SpoolWriter(layout.run_dir(stage), stage_params(stage, params))
    return MlflowWriter(stage, layout.root, stage_params(stage, params))


def stage_params(stage: str, params: Params) -> dict[str, Any]:
    """The sections that a stage reads, as flat dotted keys."""
    name = SECTIONS.get(stage, stage)
    tree = {"run": params.run, "model": params.model, name: getattr(params, name)}
    return {
        key: value
        for name, part in tree.items()
        for key, value in flatten(part.model_dump(), f"{name.rstrip('_')}.")
    }


def round_metrics(metrics: Mapping[str, float]) -> dict[str, float | int | None]:
    """Six significant digits: more would only show the order of float32 sums. NaN becomes null."""
    return {name: _round(value) for name, value in metrics.items()}


def _round(value: float) -> float | int | None:
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def history_csv(history: Sequence[Mapping[str, float]]) -> str:
    """One line a step, one column a metric; a cell is empty where a step did not log it."""
    names = sorted({name for row in history for name in row} - {"step"})
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["step", *names], lineterminator="\n")
    writer.writeheader()
    for row in history:
        writer.writerow({name: _round(value) for name, value in row.items()})
    return buffer.getvalue()
