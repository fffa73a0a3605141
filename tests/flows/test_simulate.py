"""A simulation that is broken off anywhere goes on there; and what its table and its plot are made of."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from flows import simulate
from rlhf_core.errors import InputError, RLHFError
from tasks import simulation, simulation_report
from tasks.simulation import Round, Simulation

STEPS = ("collect", "vote", "retrain", "promote")


def measured(win_rate, **more):
    low, high = win_rate - 0.1, win_rate + 0.1
    found = {"win_rate": win_rate, "win_rate_low": low, "win_rate_high": high, "gold": 0.2, "kl": 1.5}
    accuracy = {"reward_accuracy": 0.7, "reward_accuracy_low": 0.6, "reward_accuracy_high": 0.8}
    return found | {"gold_sft": 0.1} | accuracy | more


class Killed(BaseException):
    """Stands for a signal."""


@pytest.fixture
def world(tmp_path, monkeypatch, root):
    """A simulation whose steps only say that they were taken, and a kill at the step of one's choice."""
    found = Simulation(tmp_path, {"profile": "", "overrides": []})
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "params.yaml").write_text((root / "params.yaml").read_text())
    taken, kill_at = [], []

    def step(name, value):
        def take(simulated, this, *_):
            taken.append((this.number, name))
            if taken[-1:] == kill_at:
                kill_at.clear()
                raise Killed
            return value(this)

        return take

    monkeypatch.setattr(simulate, "collect", step("collect", lambda this: f"project-{this.number}"))
    monkeypatch.setattr(simulate, "vote", step("vote", lambda this: (10 * this.number, 100 * this.number)))
    monkeypatch.setattr(simulate, "retrain", step("retrain", lambda this: str(this.number + 1)))
    monkeypatch.setattr(simulate, "promote", step("promote", lambda this: "pass"))
    monkeypatch.setattr(simulation, "newest_version", lambda _: "1")
    monkeypatch.setattr(simulation, "measured_of", lambda _, version: measured(0.5 + int(version) / 10))
    monkeypatch.setattr(simulation, "champion_of", lambda _: str(taken[-1][0] + 1))
    monkeypatch.setattr(simulation, "check_same_sft", lambda *_: None)
    return found, taken, kill_at


def reopened(found):
    known = json.loads(found.state.read_text())
    return Simulation(found.directory, known["asked"], [Round(**one) for one in known["rounds"]])


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", STEPS)
def test_killed_in_any_step_it_goes_on_there_and_repeats_none_that_was_done(world, number, name):
    found, taken, kill_at = world
    kill_at.append((number, name))
    with pytest.raises(Killed):
        simulate.run_rounds(found, 2, print)
    before = list(taken)
    again = reopened(found)
    simulate.run_rounds(again, 2, print)
    everything = [(n, step) for n in (1, 2) for step in STEPS]
    cut = everything.index((number, name))
    assert before == everything[: cut + 1]
    assert taken[len(before) :] == everything[cut:]
    assert [one.votes for one in reopened(found).rounds] == [0, 10, 20]


def test_more_rounds_can_be_asked_for_later(world):
    found, taken, _ = world
    simulate.run_rounds(found, 1, print)
    simulate.run_rounds(reopened(found), 1, print)
    assert len(taken) == len(STEPS)
    simulate.run_rounds(reopened(found), 3, print)
    assert {number for number, _ in taken} == {1, 2, 3}
    assert len(taken) == 3 * len(STEPS)


def rounds():
    return [
        Round(0, registered="1", measured=measured(0.55)),
        Round(1, "p1", 30, 90, "2", "pass", "2", measured(0.6, kl=2.0), {"retrain": 60.0}),
        Round(2, "p2", 60, 180, "3", "fail", "2", measured(0.52, kl=3.0), {"retrain": 90.0}),
    ]


def test_the_champion_after_a_round_is_the_last_one_that_passed():
    live = simulation.champions(rounds())
    assert [one["win_rate"] for one in live] == [0.5, 0.6, 0.6]
    assert live[0]["gold"] == 0.1, "before the first champion there is the SFT model"


def test_table_and_files_say_what_was_measured(tmp_path):
    found = Simulation(tmp_path, {"profile": "simulate", "overrides": []}, rounds())
    simulation_report.show(found, tmp_path, "three")
    facts = json.loads((tmp_path / "reports" / "simulation" / "three.json").read_text())
    assert [one["champion_measured"]["win_rate"] for one in facts["rounds"]] == [0.5, 0.6, 0.6]
    assert (tmp_path / "reports" / "simulation" / "three.png").read_bytes().startswith(b"\x89PNG")
    shown = io.StringIO()
    Console(file=shown, width=160).print(simulation_report.table(rounds(), simulation.champions(rounds())))
    lines = [line for line in shown.getvalue().splitlines() if line.strip()]
    passed = next(i for i, line in enumerate(lines) if "pass" in line)
    assert "0.600" in lines[passed]
    assert "v2" in lines[passed]
    assert "0.50-0.70" in lines[passed + 1]
    failed = next(line for line in lines if "fail" in line)
    assert "0.520" in failed
    assert failed.rstrip().endswith("1.5"), "minutes"


def test_versions_held_against_different_sft_models_are_not_compared(monkeypatch, tmp_path):
    tags = {
        "1": {"dvc.models.sft": "a.dir"},
        "2": {"dvc.models.sft": "a.dir"},
        "3": {"dvc.models.sft": "b.dir"},
    }
    monkeypatch.setattr(simulation, "tags_of", lambda _, version: tags[version])
    simulation.check_same_sft(tmp_path, "1", "2")
    with pytest.raises(RLHFError, match=r"version 3 was held against .* b\.dir.* do not compare"):
        simulation.check_same_sft(tmp_path, "1", "3")


def test_the_clone_has_the_values_and_no_remote_and_the_checkout_is_as_it_was(tmp_path, root):
    from tasks import worktrees

    home = tmp_path / "home"
    home.mkdir()
    worktrees.git(home, "init", "-q")
    (home / ".dvc").mkdir()
    for name in ("params.yaml", "dvc.yaml", ".dvc/config"):
        (home / name).write_text((root / name).read_text())
    (home / "configs" / "profiles").mkdir(parents=True)
    (home / "configs" / "profiles" / "p.yaml").write_text("ppo: {num_updates: 3}")
    worktrees.git(home, "add", "-A")
    worktrees.git(home, *worktrees.NOBODY, "commit", "-q", "-m", "start")
    before = (home / "params.yaml").read_text()
    (home / "params.yaml").write_text(before.replace("min_votes: 50", "min_votes: 7"))
    simulation.make_checkout(home, tmp_path / "clone", "p", ["run.seed=4"])
    found = simulation.load_params(tmp_path / "clone" / "params.yaml")
    assert (found.retrain.min_votes, found.ppo.num_updates, found.run.seed) == (7, 3, 4)
    assert worktrees.dvc(home, "remote", "list")
    assert not worktrees.dvc(tmp_path / "clone", "remote", "list")
    assert not worktrees.git(tmp_path / "clone", "status", "--porcelain")
    assert "min_votes: 7" in (home / "params.yaml").read_text()
    assert "num_updates: 3 " not in (home / "params.yaml").read_text()


def test_no_setting_of_the_user_is_followed(monkeypatch):
    theirs = dict.fromkeys(("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "RLHF_FEEDBACK_DB"), "theirs")
    monkeypatch.setattr("os.environ", theirs | {"MLFLOW_DISABLE_TELEMETRY": "true", "PATH": "/bin"})
    simulation.forget_settings()
    env = simulation.environment(simulation.Path("/checkout"))
    assert not {"MLFLOW_TRACKING_URI", "PREFECT_API_URL", "RLHF_FEEDBACK_DB"} & env.keys()
    assert env["MLFLOW_DISABLE_TELEMETRY"] == "true", "telemetry stays off"
    assert env["PYTHONPATH"] == "/checkout"


def test_a_name_that_stands_for_other_values_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(simulation, "make_checkout", lambda *_: None)
    simulation.open_simulation(tmp_path, "a", "smoke", ["run.seed=1"])
    assert simulation.open_simulation(tmp_path, "a", "smoke", ["run.seed=1"]).rounds == []
    with pytest.raises(InputError, match="give another --name, or delete the directory"):
        simulation.open_simulation(tmp_path, "a", "smoke", ["run.seed=2"])
