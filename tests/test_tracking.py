"""What a stage leaves in MLflow, whatever ends it, and that a store that fails costs a warning only."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pandas as pd
import pytest

from rlhf_core.config import change_params, load_params
from rlhf_core.errors import InputError
from rlhf_core.layout import Layout
from rlhf_core.mlflow_writer import EXPERIMENT, MlflowWriter, open_client, registered_model_dir
from rlhf_core.stages.runner import (
    around_work,
    history_csv,
    open_tracker,
    open_writer,
    round_metrics,
    run_stage,
)
from rlhf_core.tracking import Tracker
from rlhf_core.tracking_spool import SpoolFollower


@pytest.fixture
def layout(root, tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text((root / "params.yaml").read_text())
    rows = [{"prompt": f"what is number {i}?", "response": f"it is {i}"} for i in range(60)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    layout = Layout(tmp_path)
    sources = {"data.demonstrations": ["mine.jsonl"], "data.preferences": [], "data.prompts": ["mine.jsonl"]}
    change_params(layout.params, sources)
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "RLHF_TRACKING"):
        monkeypatch.delenv(name, raising=False)
    return layout


def runs(layout):
    client = open_client(layout.root)
    found = client.get_experiment_by_name(EXPERIMENT)
    return [] if found is None else client.search_runs([found.experiment_id])


def test_stage_is_a_run_with_parameters_metrics_and_steps(layout):
    params = load_params(layout.params)
    run_stage("prepare", params, layout)
    (run,) = runs(layout)
    assert run.info.run_name == "prepare"
    assert run.info.status == "FINISHED"
    assert run.data.params["data.eval_fraction"] == "0.2"
    assert run.data.metrics["prepare/demonstrations_read"] == 60
    found = run.data.metrics
    assert 0.0 < found["perf/loading_seconds"] + found["perf/saving_seconds"] <= found["perf/seconds"]
    assert found["perf/starting_seconds"] > 0.0  # since this process began


def test_note_without_a_step_is_shown_at_once(layout, capsys):
    tracker = Tracker("reward", layout.run_dir("reward"))
    tracker.progress(0, 2)
    tracker.progress(0, 2, "scoring")
    assert "scoring" in capsys.readouterr().err
    tracker.close_bar()


def test_time_of_a_stage_is_told_apart_by_its_progress(layout, monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    tracker = Tracker("sft", layout.run_dir("sft"))
    assert around_work(tracker, started=100.0) == {}  # it told of no progress
    for now, done in ((103.0, 0), (110.0, 1), (115.5, 2)):  # noqa: B007 - the clock reads it
        tracker.progress(done, 2)
    tracker.close_bar()
    now = 117.0
    assert around_work(tracker, started=100.0) == {"perf/loading_seconds": 3.0, "perf/saving_seconds": 1.5}


def test_metrics_keep_their_steps_and_samples_their_rows(layout):
    with open_tracker("ppo", load_params(layout.params), layout) as tracker:
        for step in range(3):
            tracker.log({"objective/kl": step / 2}, step)
        tracker.table("samples", [{"prompt": "a", "score": 1.0}, {"prompt": "b", "score": 2.0}])
    (run,) = runs(layout)
    client = open_client(layout.root)
    history = client.get_metric_history(run.info.run_id, "objective/kl")
    assert [(m.step, m.value) for m in history] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert [a.path for a in client.list_artifacts(run.info.run_id)] == ["samples.json"]


@pytest.mark.parametrize(("error", "status"), [(InputError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_run_ends_as_its_stage_does(layout, error, status):
    with pytest.raises(type(error)), open_tracker("sft", load_params(layout.params), layout):
        raise error
    (run,) = runs(layout)
    assert run.info.status == status


def test_retry_under_the_same_flow_goes_on_with_its_run(layout):
    for parent in ("a" * 32, "a" * 32, "b" * 32):
        MlflowWriter("prepare", layout.root, {}, parent).close("FINISHED")
    assert sorted(r.data.tags["mlflow.parentRunId"][0] for r in runs(layout)) == ["a", "b"]


def test_what_a_killed_flow_left_running_is_closed_by_the_next(layout):
    client = open_client(layout.root)
    parent = client.create_run(client.create_experiment(EXPERIMENT), run_name="train").info.run_id
    left = MlflowWriter("prepare", layout.root, {}, parent)
    left.tag("any", "thing")
    left._jobs.put(None)  # the thread ends, as in a killed process, and the run stays open
    left._thread.join()
    MlflowWriter("prepare", layout.root, {}, "b" * 32).close("FINISHED")
    assert sorted(r.info.status for r in runs(layout)) == ["FINISHED", "KILLED", "KILLED"]


def track(layout, monkeypatch, switch):
    """A stage that uses all that a tracker offers, in this process; the flow's follower beside it."""
    monkeypatch.setenv("RLHF_TRACKING", switch)
    run_dir = layout.run_dir("ppo")
    follower = SpoolFollower(run_dir, lambda params: MlflowWriter("ppo", layout.root, params, "a" * 32))
    report = layout.root / "report.txt"
    report.write_text("all is well")
    rows = layout.root / "rows.parquet"
    pd.DataFrame({"prompt": ["a"], "messages": [[]]}).to_parquet(rows)
    with open_tracker("ppo", load_params(layout.params), layout) as tracker:
        for step in range(3):
            tracker.log({"objective/kl": step / 2, "objective/odd": math.nan}, step)
            follower.update()
        tracker.dataset("prompts", rows, "training")
        tracker.table("samples", [{"prompt": "ä\n", "score": 1.0}])
        tracker.warn("kl", "too high")
        tracker.artifact(report)
        tracker.log_perf({"perf/seconds": 1.5})
        tracker.final({"ppo/kl": 2.0})
    follower.finish()


def seen(run, client):
    history = client.get_metric_history(run.info.run_id, "objective/kl")
    return {
        "status": run.info.status,
        "params": run.data.params,
        "metrics": {name: repr(value) for name, value in run.data.metrics.items()},
        "history": [(m.step, m.value) for m in history],
        "warning": run.data.tags["warning.kl"],
        "artifacts": [a.path for a in client.list_artifacts(run.info.run_id)],
        "data": [(d.dataset.name, d.dataset.digest) for d in run.inputs.dataset_inputs],
    }


def test_flow_that_follows_a_stage_writes_what_the_stage_would_have_written(layout, monkeypatch):
    for switch in ("", "spool"):
        track(layout, monkeypatch, switch)
    followed, direct = runs(layout)  # newest first
    assert "mlflow.parentRunId" in followed.data.tags
    assert "mlflow.parentRunId" not in direct.data.tags
    client = open_client(layout.root)
    assert seen(followed, client) == seen(direct, client)


def test_stage_that_is_killed_is_closed_by_the_flow_that_sees_it(layout, monkeypatch):
    monkeypatch.setenv("RLHF_TRACKING", "spool")
    run_dir = layout.run_dir("sft")
    follower = SpoolFollower(run_dir, lambda params: MlflowWriter("sft", layout.root, params))
    writer = open_writer("sft", load_params(layout.params), layout)
    writer.metrics({"sft/loss": 1.0}, 7)
    with (run_dir / "tracking.jsonl").open("a") as file:
        file.write('["metrics", [["sft/lo')  # killed inside a line
    follower.finish()
    (run,) = runs(layout)
    assert run.info.status == "KILLED"
    assert run.data.metrics == {"sft/loss": 1.0}


def test_stage_that_writes_nothing_gets_no_run(layout):
    SpoolFollower(layout.run_dir("sft"), lambda params: pytest.fail("a run was opened")).finish()
    assert runs(layout) == []


def test_store_that_cannot_be_written_costs_a_warning_and_no_result(layout, monkeypatch, capsys):
    (layout.root / "blocked").write_text("a file, not a directory")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{layout.root}/blocked/mlflow.db")
    metrics = run_stage("prepare", load_params(layout.params), layout)
    assert metrics["prepare/demonstrations_read"] == 60
    assert layout.metrics("prepare").is_file()
    assert "warning: MLflow did not take all of prepare" in capsys.readouterr().err


def test_tracking_off_writes_no_store(layout, monkeypatch):
    monkeypatch.setenv("RLHF_TRACKING", "off")
    run_stage("prepare", load_params(layout.params), layout)
    assert not (layout.root / "mlflow.db").exists()


def test_registered_model_that_is_none_is_told(layout):
    with pytest.raises(InputError, match=r"models:/rlhf-policy@champion: no such registered model"):
        registered_model_dir("models:/rlhf-policy@champion", layout.root)


def test_metrics_file_holds_six_digits_and_no_nan():
    assert round_metrics({"a": 1 / 3, "b": 7, "c": float("nan"), "d": 123456.789}) == {
        "a": 0.333333,
        "b": 7,
        "c": None,
        "d": 123457.0,
    }


def test_history_leaves_cells_empty_that_a_step_did_not_log():
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "eval/loss": 1.0}]
    assert history_csv(rows) == "step,eval/loss,loss\n1,,0.5\n2,1.0,0.25\n"


def test_runs_that_are_the_first_at_once_make_one_store(tmp_path, root):
    """Each in a worktree of its own, as flows that start together; the store is the checkout's."""
    code = (
        "import sys; from pathlib import Path; "
        "from rlhf_core.mlflow_writer import open_client, experiment_id; root = Path(sys.argv[1]); "
        "print(experiment_id(open_client(root), root))"
    )
    places = [tmp_path / ".rlhf" / "worktrees" / name for name in "abc"]
    env = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"} | {"PYTHONPATH": str(root)}
    processes = []
    for place in places:
        place.mkdir(parents=True)
        command = [sys.executable, "-c", code, str(place)]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    assert {process.communicate(timeout=120)[0].strip() for process in processes} == {"1"}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert (tmp_path / "mlflow.db").is_file()


def test_the_bar_of_a_training_taken_up_again_begins_where_it_goes_on(tmp_path, capfd):
    """From 0 it would take the steps of the attempt before for work of a moment, and say too short a time."""
    tracker = Tracker("sft", tmp_path)
    tracker.progress(40, 100)
    tracker.close_bar()
    assert "40/100 [" in capfd.readouterr().err.split("\r")[1]
