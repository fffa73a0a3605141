"""Run one stage: telemetry off, tracked, timed, its metrics written last."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import resource
import time
from collections.abc import Mapping, Sequence

from rlhf_core.atomic import write_text
from rlhf_core.config import Params
from rlhf_core.errors import RLHFError
from rlhf_core.layout import Layout
from rlhf_core.tracking import Tracker


def run_stage(stage: str, params: Params, layout: Layout) -> dict[str, float]:
    """Run `stage` in the workspace; return its metrics.

    On success reports/STAGE/metrics.json (and history.csv where the stage logs steps) are written last;
    on failure .rlhf/runs/STAGE/failure.json says why, for the task that watches.
    """
    module = importlib.import_module(f"rlhf_core.stages.{stage}")
    run_dir = layout.run_dir(stage)
    tracker = Tracker(stage, run_dir)
    (run_dir / "failure.json").unlink(missing_ok=True)
    started = time.perf_counter()
    try:
        metrics = module.run(params, layout, tracker)
    except RLHFError as error:
        write_text(
            run_dir / "failure.json", json.dumps({"kind": type(error).__name__, "message": str(error)})
        )
        raise
    finally:
        tracker.close_bar()
    if tracker.history:
        write_text(layout.history(stage), history_csv(tracker.history))
    write_text(layout.metrics(stage), json.dumps(round_metrics(metrics), indent=2) + "\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    perf = {**tracker.perf, "perf/seconds": time.perf_counter() - started, "perf/peak_memory_gib": peak}
    write_text(run_dir / "perf.json", json.dumps(perf, indent=2))
    return metrics


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
