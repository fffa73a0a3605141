"""What a task shows of a running stage: warnings become events, each once."""

from __future__ import annotations

import base64
import json
from types import SimpleNamespace

import httpx
import pytest

from rlhf_core.layout import Layout
from rlhf_core.tracking import Tracker
from tasks import shown
from tasks.registry import ParentRun


def test_each_warning_of_a_stage_becomes_one_event(tmp_path, monkeypatch, capsys):
    sent = []
    monkeypatch.setattr(shown, "emit_event", lambda name, **facts: sent.append((name, facts)))
    layout = Layout(tmp_path)
    watcher = shown.Alarms("ppo", layout)
    watcher.update()
    assert sent == []

    tracker = Tracker("ppo", layout.run_dir("ppo"))
    for text in ("KL is high; raise ppo.kl_coef", "KL is higher; raise ppo.kl_coef"):
        tracker.warn("kl_runs_away", text)
        watcher.update()
    tracker.warn("dead_critic", "raise ppo.critic_learning_rate")
    watcher.update()
    watcher.update()

    assert [name for name, _ in sent] == ["rlhf.warning.kl_runs_away", "rlhf.warning.dead_critic"]
    assert sent[0][1]["resource"] == {"prefect.resource.id": "rlhf.stage.ppo"}
    assert sent[0][1]["payload"] == {"stage": "ppo", "warning": "KL is high; raise ppo.kl_coef"}
    said = capsys.readouterr().err
    assert said.count("warning: ppo:") == 2


def test_warnings_of_an_earlier_run_are_not_sent_again(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(shown, "emit_event", lambda name, **facts: sent.append(name))
    layout = Layout(tmp_path)
    file = layout.run_dir("ppo") / "warnings.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"dead_critic": "old"}))
    shown.Alarms("ppo", layout).update()
    assert sent == []


def test_a_half_written_warning_file_waits_for_the_next_look(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(shown, "emit_event", lambda name, **facts: sent.append(name))
    layout = Layout(tmp_path)
    watcher = shown.Alarms("ppo", layout)
    file = layout.run_dir("ppo") / "warnings.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"dead_cr')
    watcher.update()
    file.write_text('{"dead_critic": "now"}')
    watcher.update()
    assert sent == ["rlhf.warning.dead_critic"]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_flood_of_lines_is_thinned_and_every_line_is_accounted_for():
    sent, clock = [], Clock()
    log = shown.ThinnedLog(sent.append, clock)
    for number in range(1000):
        log.line(f"line {number}")
    assert sent == [f"line {n}" for n in range(200)]
    clock.now = 2.0  # ten more lines are allowed by then
    for number in range(1000, 1100):
        log.line(f"line {number}")
    log.finish()
    assert sent[200] == "... 800 lines are in the log file only"
    assert sent[201:211] == [f"line {n}" for n in range(1000, 1010)]
    assert sent[211:] == ["... 90 lines are in the log file only"]


def test_a_quiet_log_is_handed_on_whole():
    sent, clock = [], Clock()
    log = shown.ThinnedLog(sent.append, clock)
    for number in range(2000):
        clock.now += 0.3
        log.line(str(number))
    log.finish()
    assert sent == [str(number) for number in range(2000)]


@pytest.fixture
def artifacts(monkeypatch):
    """What is shown, by key, instead of on a server."""
    found = {}

    def create(data, key, description=""):
        found[key] = data
        return key

    class Client:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update_artifact(self, key, change):
            found[key] = change.data

    monkeypatch.setattr(shown, "create_markdown_artifact", create)
    monkeypatch.setattr(shown, "create_table_artifact", create)
    monkeypatch.setattr(shown, "create_progress_artifact", create)
    monkeypatch.setattr(shown, "update_progress_artifact", lambda key, value: found.update({key: value}))
    monkeypatch.setattr(shown, "get_client", lambda sync_client: Client())
    return found


def picture_of(text):
    start = "![curves of sft](data:image/png;base64,"
    assert text.startswith(start)
    data = base64.b64decode(text.removeprefix(start).removesuffix(")"), validate=True)
    assert data.startswith(b"\x89PNG")
    return data


def test_curves_are_drawn_while_the_stage_runs_and_whole_at_its_end(tmp_path, artifacts, monkeypatch):
    monkeypatch.setattr(shown, "CURVES_SECONDS", 0.0)
    monkeypatch.setattr(shown, "CURVES_SHARE", 0.0)
    layout = Layout(tmp_path)
    layout.run_dir("sft").mkdir(parents=True)
    (layout.run_dir("sft") / "history.jsonl").write_text(
        '{"step": 1, "train/loss": 9.0}\n'
    )  # an earlier run's
    curves = shown.Curves("sft", layout)
    curves.update()
    assert artifacts == {}

    tracker = Tracker("sft", layout.run_dir("sft"))
    tracker.log({"train/loss": 2.0}, 1)
    curves.update()
    first = picture_of(artifacts["sft-curves"])
    tracker.log({"train/loss": 1.0, "eval/loss": 1.5}, 2)
    curves.update()
    second = picture_of(artifacts["sft-curves"])
    assert second != first

    layout.history("sft").parent.mkdir(parents=True)
    layout.history("sft").write_text("step,eval/loss,train/loss\n1,,2\n2,1.5,1\n")
    curves.finish()
    assert picture_of(artifacts["sft-curves"]) == second  # the same numbers


def test_a_server_that_is_away_costs_one_warning_and_no_training(tmp_path, monkeypatch):
    warned = []
    logger = SimpleNamespace(warning=lambda *words: warned.append(words[0] % words[1:]))
    monkeypatch.setattr(shown, "get_run_logger", lambda: logger)
    layout = Layout(tmp_path)
    showing = shown.Showing("sft", layout)
    Tracker("sft", layout.run_dir("sft")).progress(1, 4)

    def away(*arguments, **named):
        raise httpx.ConnectError("All connection attempts failed")

    shown_at = []
    monkeypatch.setattr(shown, "create_progress_artifact", away)
    showing.update()
    showing.update()
    assert len(warned) == 1
    assert "All connection attempts failed" in warned[0]
    monkeypatch.setattr(shown, "create_progress_artifact", lambda percent, **named: shown_at.append(percent))
    showing.update()
    assert shown_at == [25.0]  # what could not be shown is shown once the server is back


def test_the_log_artifact_names_the_file_and_ends_as_the_log_does(tmp_path, artifacts):
    log = tmp_path / "output.log"
    log.write_text("".join(f"line {n}\n" for n in range(100)) + "\r10%\r<b>done</b>\n")
    shown.show_log("sft", log, "http://mlflow/#/run/artifacts/output.log")
    text = artifacts["sft-log"]
    assert f"`{log.resolve()}`" in text
    assert "(http://mlflow/#/run/artifacts/output.log)" in text
    assert "line 98\n" in text
    assert "line 20\n" not in text
    assert "&lt;b&gt;done&lt;/b&gt;</pre>" in text
    assert "10%" not in text


def test_result_is_shown_as_numbers_samples_and_report(tmp_path, artifacts):
    layout = Layout(tmp_path)
    layout.evaluation.mkdir(parents=True)
    (layout.evaluation / "report.html").write_text("<html>")
    Tracker("evaluate", layout.run_dir("evaluate")).table("some_rows", [{"prompt": "hello"}])
    page = "http://mlflow/#/experiments/1/runs/abc"
    shown.show_result("evaluate", {"eval/kl": 0.5}, False, layout, page)
    assert artifacts["evaluate-metrics"] == [{"metric": "eval/kl", "value": 0.5}]
    assert artifacts["evaluate-some-rows"] == [{"prompt": "hello"}]
    assert f"({page}/artifacts/evaluation/report.html)" in artifacts["evaluate-report"]


def test_runs_are_linked_both_ways(tmp_path, monkeypatch):
    links, tags = {}, {}
    monkeypatch.setattr(shown, "create_link_artifact", lambda link, key, link_text: links.update({key: link}))
    client = SimpleNamespace(set_tag=lambda run, key, value: tags.update({(run, key): value}))
    monkeypatch.setattr(shown, "open_client", lambda root: client)
    parent = ParentRun("abc", "1", "http://mlflow", {"prefect.url": "http://prefect/runs/1"})
    shown.link_runs(tmp_path, parent)
    assert links == {"mlflow-run": "http://mlflow/#/experiments/1/runs/abc"}
    assert "(http://prefect/runs/1)" in tags["abc", "mlflow.note.content"]
