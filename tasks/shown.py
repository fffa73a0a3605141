"""What Prefect shows of a stage: progress, curves, warnings, numbers, sample rows, log and links.

Nothing here can stop a training: while the server is away, what would be shown is left out.
"""

from __future__ import annotations

import base64
import html
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.events import emit_event
from prefect.logging import get_run_logger

from rlhf_core.curves import draw_curves, read_lines
from rlhf_core.evaluation.plots import History, read_history
from rlhf_core.layout import Layout
from rlhf_core.mlflow_writer import open_client
from tasks.registry import ParentRun

CURVES_SECONDS = 30.0  # between two pictures of one stage, at first
CURVES_SHARE = (
    0.1  # of the time that it has run: later on pictures come less often, and days make some dozens
)
LOG_TAIL = 40  # last lines of the log in its artifact
REPORTS = {"validate": ("validation", "index.html"), "evaluate": ("evaluation", "report.html")}


class Showing:
    """What follows a stage while it runs; `update` is called about once a second, `finish` at its end."""

    def __init__(self, stage: str, layout: Layout) -> None:
        self._followers = (Progress(stage, layout), Alarms(stage, layout), Curves(stage, layout))
        self._warned = False

    def update(self) -> None:
        for follower in self._followers:
            self.harmless(follower.update)

    def finish(self, succeeded: bool) -> None:
        for follower in self._followers:
            self.harmless(follower.finish if succeeded else follower.update)

    def harmless(self, show: Callable[[], None]) -> None:
        """A server that is away costs one warning a stage, and what is not shown meanwhile."""
        try:
            show()
        except Exception as error:
            if not self._warned:
                self._warned = True
                get_run_logger().warning(
                    "cannot show the stage in Prefect: %s; it goes on", str(error) or repr(error)
                )


class Progress:
    """A progress artifact that follows .rlhf/runs/STAGE/progress.json."""

    def __init__(self, stage: str, layout: Layout) -> None:
        self._stage = stage
        self._file = layout.run_dir(stage) / "progress.json"
        self._file.unlink(missing_ok=True)
        self._artifact: Any = None
        self._shown = -1.0

    def update(self) -> None:
        state = read_object(self._file)
        if state.get("total"):
            self._show(100.0 * state["done"] / state["total"])

    def finish(self) -> None:
        self._show(100.0)

    def _show(self, percent: float) -> None:
        if (percent - self._shown < 5.0 and percent < 100.0) or percent == self._shown:
            return
        if self._artifact is None:
            self._artifact = create_progress_artifact(
                percent, key=f"{self._stage}-progress", description=f"Progress of {self._stage}"
            )
        else:
            update_progress_artifact(self._artifact, percent)
        self._shown = percent


class Curves:
    """A picture of the stage's curves, drawn again while they grow.

    The picture is inside the artifact: it needs no server, and stays when the workspace is gone.
    """

    def __init__(self, stage: str, layout: Layout) -> None:
        self._stage, self._layout = stage, layout
        self._file = layout.run_dir(stage) / "history.jsonl"
        self._file.unlink(missing_ok=True)  # of an earlier run; the stage writes it anew
        self._artifact: Any = None
        self._started = self._drawn = time.monotonic()

    def update(self) -> None:
        now = time.monotonic()
        if now - self._drawn >= max(CURVES_SECONDS, CURVES_SHARE * (now - self._started)):
            self._drawn = now
            self._show(read_lines(self._file))

    def finish(self) -> None:
        """From the stage's report, which holds every step."""
        self._show(read_history(self._layout.history(self._stage)))

    def _show(self, history: History) -> None:
        if (picture := draw_curves(self._stage, history)) is None:
            return
        text = f"![curves of {self._stage}](data:image/png;base64,{base64.b64encode(picture).decode()})"
        if self._artifact is None:
            self._artifact = create_markdown_artifact(
                text, key=f"{self._stage}-curves", description=f"Curves of {self._stage}"
            )
        else:
            with get_client(sync_client=True) as client:
                client.update_artifact(self._artifact, ArtifactUpdate(data=text))


class Alarms:
    """An event `rlhf.warning.NAME` for each warning in .rlhf/runs/STAGE/warnings.json, for automations."""

    def __init__(self, stage: str, layout: Layout) -> None:
        self._stage = stage
        self._file = layout.run_dir(stage) / "warnings.json"
        self._file.unlink(missing_ok=True)
        self._sent: set[str] = set()

    def update(self) -> None:
        for name, text in read_object(self._file).items():
            if name not in self._sent:
                self._sent.add(name)
                emit_event(
                    f"rlhf.warning.{name}",
                    resource={"prefect.resource.id": f"rlhf.stage.{self._stage}"},
                    payload={"stage": self._stage, "warning": text},
                )

    def finish(self) -> None:
        self.update()


class ThinnedLog:
    """Hands lines on to the run's log in Prefect, so many a second; counts what it leaves out.

    The API takes each line as a row of its database. The whole log is in a file.
    """

    BURST = 200
    PER_SECOND = 5.0

    def __init__(self, send: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._send, self._clock = send, clock
        self._allowed = float(self.BURST)
        self._last = clock()
        self._left_out = 0

    def line(self, text: str) -> None:
        now = self._clock()
        self._allowed = min(self.BURST, self._allowed + (now - self._last) * self.PER_SECOND)
        self._last = now
        if self._allowed < 1.0:
            self._left_out += 1
            return
        self.finish()
        self._allowed -= 1.0
        self._send(text)

    def finish(self) -> None:
        """Say how many lines were left out since the last one that was not."""
        if self._left_out:
            self._send(f"... {self._left_out} lines are in the log file only")
            self._left_out = 0


def show_result(
    stage: str, metrics: Mapping[str, Any], cached: bool, layout: Layout, run_page: str = ""
) -> None:
    """The stage's numbers, sample rows and report as artifacts; `run_page` is that of its MLflow run."""
    rows = [{"metric": name, "value": value} for name, value in metrics.items()]
    note = "taken from the cache" if cached else "computed"
    create_table_artifact(rows, key=f"{stage}-metrics", description=f"{stage}, {note}")
    for path in sorted(layout.run_dir(stage).glob("*.table.json")):
        key = f"{stage}-{path.name.removesuffix('.table.json').replace('_', '-')}"
        create_table_artifact(_read_list(path), key=key, description=f"Rows shown by {stage}")
    if stage in REPORTS:
        directory, name = REPORTS[stage]
        page = layout.root / "reports" / directory / name
        if page.is_file():
            url = f"{run_page}/artifacts/{directory}/{name}" if run_page else ""
            show_file(f"{stage}-report", f"{stage} report", page, url)


def show_log(stage: str, log: Path, url: str) -> None:
    """Where the whole log is, with its last lines."""
    written = log.read_bytes().decode("utf-8", "replace") if log.is_file() else ""
    # Of a progress bar, whose states end with a carriage return, the last one.
    last = [line.rstrip("\r").rpartition("\r")[2] for line in written.rstrip("\n").split("\n")[-LOG_TAIL:]]
    text = f"{_where(log, url)}\n\nIts last lines:\n\n<pre>{html.escape(chr(10).join(last))}</pre>"
    create_markdown_artifact(text, key=f"{stage}-log", description=f"The whole log of {stage}")


def show_file(key: str, title: str, path: Path, url: str) -> None:
    create_markdown_artifact(_where(path, url), key=key, description=title)


def _where(path: Path, url: str) -> str:
    """A browser does not follow a link from a page to a file of the machine, so its path is a text."""
    link = f"[Open in MLflow]({url}), or on the machine of the run:" if url else "On the machine of the run:"
    return f"{link} `{path.resolve()}`"


def link_runs(root: Path, parent: ParentRun) -> None:
    """Where the flow run lies in MLflow, and there where it lies in Prefect."""
    if page := mlflow_page(parent.uri, parent.experiment, parent.run_id):
        create_link_artifact(page, key="mlflow-run", link_text="MLflow run")
    else:
        text = f"MLflow run `{parent.run_id}` in `{parent.uri}`; `make up` shows it in a browser."
        create_markdown_artifact(text, key="mlflow-run", description="Where this run is tracked")
    if url := parent.origin.get("prefect.url"):
        note = f"Run by Prefect: [{url}]({url})"  # MLflow shows it as the run's description
        open_client(root).set_tag(parent.run_id, "mlflow.note.content", note)


def mlflow_page(tracking_uri: str, experiment: str, run_id: str) -> str:
    """The page of a run; empty where MLflow has no server."""
    if not (tracking_uri.startswith("http") and run_id):
        return ""
    return f"{tracking_uri.rstrip('/')}/#/experiments/{experiment}/runs/{quote(run_id)}"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an absent or half-written one is empty."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_list(path: Path) -> list[Mapping[str, Any]]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
