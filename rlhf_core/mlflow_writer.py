"""Writing one stage's run to MLflow from a thread, and where MLflow's store is.

SQLite below the workspace unless MLFLOW_TRACKING_URI says otherwise. With RLHF_TRACKING=off nothing is
written; with RLHF_TRACKING=spool a stage leaves the writing to the flow that started it. No result depends on
any of this: a store that cannot be reached costs a warning.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import queue
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_core.errors import InputError
from rlhf_core.layout import Layout

EXPERIMENT = "rlhf"
SWITCH_VARIABLE = "RLHF_TRACKING"
CLOSE_SECONDS = 60.0
BATCH_SECONDS = 1.0


def tracking_uri(root: Path) -> str:
    """Absolute, since stages run in other directories; one store for a checkout and its worktrees."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Layout(root).home.resolve()}/mlflow.db"


def open_client(root: Path):
    """An MLflow client on the workspace's store, its telemetry off."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import logging

    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    uri = tracking_uri(root)
    if not uri.startswith("sqlite:"):
        return MlflowClient(uri, registry_uri=uri)
    with _one_at_a_time(Layout(root).home):
        client = MlflowClient(uri, registry_uri=uri)
        client.get_experiment_by_name(EXPERIMENT)  # by then the tables are there
        return client


@contextlib.contextmanager
def _one_at_a_time(home: Path) -> Iterator[None]:
    """Two processes that make the tables of one database at once would fail."""
    lock = Layout(home).state / "mlflow.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def experiment_id(client: Any, root: Path) -> str:
    """Of the experiment `rlhf`; made on first use, safely when several stages are first at once."""
    from mlflow.exceptions import MlflowException

    for _ in range(2):
        found = client.get_experiment_by_name(EXPERIMENT)
        if found is not None:
            return found.experiment_id
        try:
            return client.create_experiment(EXPERIMENT, artifact_location=_artifacts(root))
        except MlflowException:
            continue  # somebody else was first
    return client.get_experiment_by_name(EXPERIMENT).experiment_id


def _artifacts(root: Path) -> str | None:
    """Beside a store that is a file here; a server knows best where its own lie."""
    if tracking_uri(root).startswith("http"):
        return None
    return f"file://{Layout(root).home.resolve()}/mlartifacts"


class TimedMetric(NamedTuple):
    """One value as MLflow keeps it; `time` in milliseconds since 1970."""

    name: str
    value: float
    time: int
    step: int


def timed(metrics: Mapping[str, float], step: int) -> list[TimedMetric]:
    """The metrics as of now."""
    now = int(time.time() * 1000)
    return [TimedMetric(name, float(value), now, step) for name, value in metrics.items()]


class MlflowWriter:
    """The MLflow run of one stage. Calls return at once; `close` waits until all is written."""

    def __init__(self, stage: str, root: Path, params: Mapping[str, Any], parent: str = "") -> None:
        self._stage, self._root, self._params, self._parent = stage, root, params, parent
        self._state_file = root / ".rlhf" / "runs" / stage / "mlflow.json"
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._pending: list[TimedMetric] = []
        self._client: Any = None
        self._run_id = ""
        self._fault: Exception | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.timed_metrics(timed(metrics, step))

    def timed_metrics(self, metrics: Sequence[TimedMetric]) -> None:
        with self._lock:
            self._pending += metrics

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        data = {key: [row.get(key) for row in rows] for key in rows[0]}
        self._jobs.put(lambda: self._client.log_table(self._run_id, data, f"{name}.json"))

    def tag(self, name: str, value: str) -> None:
        self._jobs.put(lambda: self._client.set_tag(self._run_id, name, value))

    def artifact(self, path: Path) -> None:
        def job() -> None:
            if path.is_dir():
                self._client.log_artifacts(self._run_id, str(path), path.name)
            elif path.exists():
                self._client.log_artifact(self._run_id, str(path))

        self._jobs.put(job)

    def dataset(self, name: str, path: Path, context: str) -> None:
        self._jobs.put(lambda: self._log_dataset(name, path, context))

    def close(self, status: str) -> None:
        """End the run with `status` (FINISHED, FAILED or KILLED); a dead store is waited for only so long."""
        self._jobs.put(lambda: self._client.set_terminated(self._run_id, status))
        self._jobs.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive() or self._fault is not None:
            print(
                f"warning: MLflow did not take all of {self._stage}: {self._fault or 'too slow'}",
                file=sys.stderr,
            )

    def _work(self) -> None:
        try:
            self._client = open_client(self._root)
            self._run_id = self._open_run()
            while True:
                try:
                    job = self._jobs.get(timeout=BATCH_SECONDS)
                except queue.Empty:
                    self._flush()
                    continue
                self._flush()
                if job is None:
                    return
                job()
        except Exception as error:  # whatever a store does, training goes on
            self._fault = error

    def _flush(self) -> None:
        from mlflow.entities import Metric

        with self._lock:
            pending, self._pending = self._pending, []
        for start in range(0, len(pending), 1000):
            batch = [Metric(*entry) for entry in pending[start : start + 1000]]
            self._client.log_batch(self._run_id, metrics=batch)

    def _open_run(self) -> str:
        """The run of this stage: a child of the flow's run; a retry under the same parent goes on with its
        run."""
        from mlflow.entities import Param

        parent = self._parent
        known = json.loads(self._state_file.read_text()) if self._state_file.is_file() else {}
        if parent and known.get("parent") == parent:
            self._client.update_run(known["run"], status="RUNNING")
            return known["run"]
        for broken_off in (known.get("run"), known.get("parent")):
            self._close_if_running(broken_off)
        tags = {"rlhf.stage": self._stage} | ({"mlflow.parentRunId": parent} if parent else {})
        experiment = experiment_id(self._client, self._root)
        run_id = self._client.create_run(experiment, run_name=self._stage, tags=tags).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in self._params.items()]
        self._client.log_batch(run_id, params=params)
        self._state_file.parent.mkdir(parents=True, exist_ok=True)
        self._state_file.write_text(json.dumps({"parent": parent, "run": run_id}))
        return run_id

    def _close_if_running(self, run_id: str | None) -> None:
        """A flow that is killed closes no run. Only one works in a workspace: what runs here now is us."""
        from mlflow.exceptions import MlflowException

        with contextlib.suppress(MlflowException):  # a run that somebody deleted
            if run_id and self._client.get_run(run_id).info.status == "RUNNING":
                self._client.set_terminated(run_id, "KILLED")

    def _log_dataset(self, name: str, path: Path, context: str) -> None:
        """A data set input whose digest is the md5 by which DVC knows the file."""
        import mlflow
        import pandas as pd
        from mlflow.entities import DatasetInput, InputTag

        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "md5").hexdigest()
        frame = pd.read_parquet(path).head(1000)
        source = str(path.relative_to(self._root)) if path.is_relative_to(self._root) else str(path)
        with warnings.catch_warnings():  # about sources and integer columns, nothing a user can act on
            warnings.simplefilter("ignore")
            found = mlflow.data.from_pandas(
                frame.drop(columns=["messages"]), source=source, name=name, digest=digest
            )
            entry = DatasetInput(found._to_mlflow_entity(), [InputTag("mlflow.data.context", context)])
        self._client.log_inputs(self._run_id, [entry])


def registered_model_dir(uri: str, root: Path, into: Path | None = None) -> Path:
    """The Hugging Face directory inside a registered version, `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    What does not lie on this machine is downloaded to `into`, or to a temporary directory that stays.

    Raises InputError when there is no such version.
    """
    client = open_client(root)
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        name, _, rest = uri.removeprefix("models:/").partition("@" if "@" in uri else "/")
        if "@" in uri:
            rest = client.get_model_version_by_alias(name, rest).version
        location = client.get_model_version_download_uri(name, rest)
        mlflow.set_tracking_uri(tracking_uri(root))
        here = location.startswith(("file:", "/"))
        local = Path(
            mlflow.artifacts.download_artifacts(location, dst_path=None if here or not into else str(into))
        )
    except (MlflowException, OSError) as error:
        raise InputError(f"{uri}: no such registered model in {tracking_uri(root)}: {error}") from None
    found = next(local.glob("artifacts/*/config.json"), None)
    if found is None:
        raise InputError(f"{uri}: holds no weights; {local}/provenance.json says where DVC has them")
    return found.parent
