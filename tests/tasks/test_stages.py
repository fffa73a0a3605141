"""Which failures of a stage are worth another try, and that the log of a retry goes on."""

from __future__ import annotations

import json
import sys

import pytest
from prefect.logging import disable_run_logger

from rlhf_core.errors import DataRejected, InputError, RLHFError
from rlhf_core.layout import Layout
from rlhf_core.optim import DivergedError
from rlhf_core.stages.runner import open_tracker
from tasks import stages
from tasks.processes import Finished, run_command


def failure_of(error, params, layout, monkeypatch):
    """What the task makes of a stage that raised `error`."""
    monkeypatch.setenv("RLHF_TRACKING", "off")
    with pytest.raises(type(error)), open_tracker("ppo", params, layout):
        raise error
    return stages.stage_error("ppo", Finished(1, "the last line"), layout, params)


@pytest.mark.parametrize(
    ("error", "retryable"),
    [
        (InputError("params.yaml: ppo.gamma = 2: above 1"), False),
        (DataRejected("the data is not fit to train on"), False),
        (DivergedError("gradients are not finite"), False),
        (RLHFError("labeler endpoint http://x: failed 5 times"), True),
        (MemoryError("no memory"), True),
        (ConnectionError("reset by peer"), True),
    ],
)
def test_only_what_may_go_better_is_tried_again(error, retryable, params, tmp_path, monkeypatch):
    failed = failure_of(error, params, Layout(tmp_path), monkeypatch)
    assert failed.retryable is retryable
    if isinstance(error, RLHFError):
        assert str(failed) == f"ppo: {error}"
    else:
        assert "the last line" in str(failed)


def test_links_to_own_files_are_there_before_dvc_looks(params, tmp_path, monkeypatch):
    def look(*arguments):
        assert [link.name for link in Layout(tmp_path).sources.iterdir()] == ["demonstrations-0-mine.csv"]
        raise KeyboardInterrupt

    (tmp_path / "mine.csv").write_text("prompt,response")
    data = params.data.model_copy(update={"demonstrations": ("mine.csv",)})
    monkeypatch.setattr(stages, "SpoolFollower", look)
    with disable_run_logger(), pytest.raises(KeyboardInterrupt):
        stages.run_stage(tmp_path, "prepare", params.model_copy(update={"data": data}))


@pytest.mark.parametrize("status", [-9, 137, 255])
def test_a_stage_that_was_killed_is_tried_again(status, params, tmp_path):
    failed = stages.stage_error("ppo", Finished(status, "Killed"), Layout(tmp_path), params)
    assert failed.retryable
    assert str(status) in str(failed)


def test_a_stage_that_takes_too_long_would_again(params, tmp_path):
    failed = stages.stage_error("ppo", Finished(-15, "", timed_out=True), Layout(tmp_path), params)
    assert not failed.retryable
    assert "flow.stage_time_limit" in str(failed)


def test_log_of_a_retry_goes_on_and_of_a_new_run_begins(tmp_path):
    def log_of(word, append):
        run_command(
            [sys.executable, "-c", f"print({word!r})"],
            cwd=tmp_path,
            env={},
            on_line=lambda line: None,
            log_file=tmp_path / "output.log",
            time_limit=30.0,
            append=append,
        )
        return (tmp_path / "output.log").read_text().split()

    assert log_of("old", append=False) == ["old"]
    assert log_of("first", append=False) == ["first"]
    assert log_of("again", append=True) == ["first", "again"]


def test_page_in_mlflow_is_that_of_the_stage_below_this_parent(tmp_path):
    layout = Layout(tmp_path)
    parent = stages.ParentRun("mother", "7", "http://mlflow")
    state = layout.run_dir("sft") / "mlflow.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"parent": "mother", "run": "child"}))
    assert stages._run_page("sft", layout, parent) == "http://mlflow/#/experiments/7/runs/child"
    state.write_text(json.dumps({"parent": "another", "run": "child"}))  # the stage came from the cache
    assert stages._run_page("sft", layout, parent) == ""
    assert stages._run_page("sft", layout, None) == ""
