"""What a task shows of a running stage: warnings become events, each once."""

from __future__ import annotations

import json

from rlhf_core.layout import Layout
from rlhf_core.tracking import Tracker
from tasks import stages


def test_each_warning_of_a_stage_becomes_one_event(tmp_path, monkeypatch, capsys):
    sent = []
    monkeypatch.setattr(stages, "emit_event", lambda name, **facts: sent.append((name, facts)))
    layout = Layout(tmp_path)
    watcher = stages.Alarms("ppo", layout)
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
    monkeypatch.setattr(stages, "emit_event", lambda name, **facts: sent.append(name))
    layout = Layout(tmp_path)
    file = layout.run_dir("ppo") / "warnings.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"dead_critic": "old"}))
    stages.Alarms("ppo", layout).update()
    assert sent == []


def test_a_half_written_warning_file_waits_for_the_next_look(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(stages, "emit_event", lambda name, **facts: sent.append(name))
    layout = Layout(tmp_path)
    watcher = stages.Alarms("ppo", layout)
    file = layout.run_dir("ppo") / "warnings.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"dead_cr')
    watcher.update()
    file.write_text('{"dead_critic": "now"}')
    watcher.update()
    assert sent == ["rlhf.warning.dead_critic"]
