"""What a stage leaves in MLflow, whatever ends it, and that a store that fails costs a warning only."""

from __future__ import annotations

import json

import pytest

from rlhf_core.config import change_params, load_params
from rlhf_core.errors import InputError
from rlhf_core.layout import Layout
from rlhf_core.mlflow_writer import EXPERIMENT, PARENT_VARIABLE, open_client, registered_model_dir
from rlhf_core.stages.runner import history_csv, open_tracker, round_metrics, run_stage


@pytest.fixture
def layout(root, tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text((root / "params.yaml").read_text())
    rows = [{"prompt": f"what is number {i}?", "response": f"it is {i}"} for i in range(60)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    layout = Layout(tmp_path)
    sources = {"data.demonstrations": ["mine.jsonl"], "data.preferences": [], "data.prompts": ["mine.jsonl"]}
    change_params(layout.params, sources)
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "RLHF_TRACKING", PARENT_VARIABLE):
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
    assert run.data.metrics["perf/seconds"] > 0


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


def test_retry_under_the_same_flow_goes_on_with_its_run(layout, monkeypatch):
    params = load_params(layout.params)
    monkeypatch.setenv(PARENT_VARIABLE, "a" * 32)
    for _ in range(2):
        run_stage("prepare", params, layout)
    monkeypatch.setenv(PARENT_VARIABLE, "b" * 32)
    run_stage("prepare", params, layout)
    assert sorted(r.data.tags["mlflow.parentRunId"][0] for r in runs(layout)) == ["a", "b"]


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
