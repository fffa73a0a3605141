"""The whole loop without people on a tiny model: collect, vote at the real pages, retrain, promote, twice."""

from __future__ import annotations

import json
import signal
import time

import pytest
import yaml

from feedback.history import last_event, votes_at
from feedback.store import Store
from rlhf_core.mlflow_writer import open_client
from tasks.retraining import used_to

from .checkouts import make_checkout, processes_below, run, start, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

COMMAND = ["rlhf", "simulate", "--rounds", "2", "--profile", "smoke"]
# The tiny model says nothing that the lexicon knows, so people must see differences where there are none.
VALUES = ["-S", "simulate.tie_gap=0.0", "-S", "retrain.start=champion"]


@pytest.fixture(scope="module")
def simulated(root, tmp_path_factory):
    """A checkout in which two rounds were broken off once, by SIGKILL in the second training, and ended."""
    checkout = make_checkout(root, tmp_path_factory.mktemp("simulated"))
    place = checkout / ".rlhf" / "simulations" / "default"
    # Settings of the user's own stores, which a simulation must not follow.
    theirs = {"MLFLOW_TRACKING_URI": f"sqlite:///{checkout}/theirs.db"}
    theirs |= {"RLHF_FEEDBACK_DB": str(checkout / "their-votes.db")}
    first = start([*COMMAND, *VALUES], checkout, checkout / "first.log", **theirs)
    log = place / "logs" / "2-retrain.log"
    wait_for(lambda: first.poll() is not None or (log.is_file() and "reward" in log.read_text()), 1500)
    assert first.poll() is None, (checkout / "first.log").read_text()[-3000:]
    first.send_signal(signal.SIGKILL)
    first.wait()
    wait_for(lambda: not processes_below(place), 60)  # what it had started goes with it
    broken_off = json.loads((place / "state.json").read_text())
    began = time.time()
    done = run([*COMMAND, *VALUES], checkout, timeout=1800, **theirs)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((checkout / "reports" / "simulation" / "default.json").read_text())
    return checkout, place, broken_off, report, done.stdout, began


def test_it_goes_on_at_the_round_that_was_broken_off(simulated):
    _, place, broken_off, report, _, began = simulated
    before, after = broken_off["rounds"], report["rounds"]
    assert [one["number"] for one in after] == [0, 1, 2]
    kept = {"champion_measured"}
    assert {k: v for k, v in after[1].items() if k not in kept} == before[1], "round 1 was done, and stays"
    assert (before[2]["project"], before[2]["event"]) == (after[2]["project"], after[2]["event"])
    assert not before[2]["registered"]
    assert after[2]["registered"]
    assert (place / "logs" / "2-collect.log").stat().st_mtime < began, "nobody is asked twice"


def test_every_vote_is_in_the_data_of_the_last_version(simulated):
    _, place, _, report, _, _ = simulated
    home = place / "checkout"
    store = Store(home / ".rlhf" / "feedback" / "feedback.db")
    number = last_event(store)
    votes = votes_at(store, number, 0)
    store.close()
    assert report["rounds"][2]["votes"] == votes.num_votes > report["rounds"][1]["votes"] > 0
    client = open_client(home)
    tags = client.get_model_version("rlhf-policy", report["rounds"][2]["registered"]).tags
    assert int(tags["feedback.votes"]) == votes.num_votes
    assert int(tags["feedback.new_votes"]) == votes.num_votes - report["rounds"][1]["votes"]
    assert tags["feedback.since_event"] == str(report["rounds"][1]["event"])
    assert tags["dvc.data.feedback"].endswith(".dir")
    from rlhf_core.config import load_params

    assert used_to(home, load_params(home / "params.yaml"), votes.store) == number


def test_the_loop_ends_with_table_plot_and_numbers(simulated):
    checkout, _, _, report, shown, _ = simulated
    assert "Gold win rate over the first SFT model, by round" in shown
    picture = checkout / "reports" / "simulation" / "default.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    for one in report["rounds"][1:]:
        measured = one["measured"]
        assert 0.0 <= measured["win_rate_low"] <= measured["win_rate"] <= measured["win_rate_high"] <= 1.0
        assert one["verdict"] in ("pass", "fail")
        assert set(one["seconds"]) == {"collect", "vote", "retrain", "promote"}


def test_the_users_own_votes_and_models_are_as_they_were(simulated):
    checkout, _, _, _, _, _ = simulated
    assert not (checkout / "mlflow.db").exists()
    assert not (checkout / ".rlhf" / "feedback").exists()
    assert not (checkout / ".dvc" / "cache").exists()
    assert run(["git", "branch", "--list", "runs/*"], checkout).stdout == ""
    changed = run(["git", "status", "--porcelain"], checkout).stdout.splitlines()
    assert sorted(changed) == ["?? first.log", "?? reports/"]


def test_other_values_under_the_same_name_are_refused(simulated):
    checkout, *_ = simulated
    done = run([*COMMAND, "-S", "run.seed=9"], checkout)
    assert done.returncode == 2
    assert "give another --name" in done.stderr


def test_mixed_labels_from_the_champion(simulated):
    """The candidate that was made last becomes champion by hand, and the next one starts there."""
    _, place, _, report, _, _ = simulated
    home = place / "checkout"
    client, champion = open_client(home), report["rounds"][2]["registered"]
    client.set_registered_model_alias("rlhf-policy", "champion", champion)
    values = ["-S", "retrain.labels=mixed", "-S", "retrain.start=champion"]
    done = run(["rlhf", "retrain", "--force", *values], home, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    made = client.get_model_version_by_alias("rlhf-policy", "candidate")
    before = client.get_model_version("rlhf-policy", champion).tags
    assert made.tags["retrain.champion"] == champion
    assert made.tags["dvc.models.champion"] == before["dvc.models.policy"]
    assert made.tags["dvc.models.sft"] == before["dvc.models.sft"], "without corrections SFT stays as it is"
    branch = made.tags["rlhf.branch"]
    lock = yaml.safe_load(run(["git", "show", f"{branch}:dvc.lock"], home).stdout)["stages"]["ppo"]
    (dep,) = (one for one in lock["deps"] if one["path"] == "models/champion")
    assert dep["md5"] == before["dvc.models.policy"], "DVC knows where PPO started"
    metrics = client.get_run(made.tags["mlflow.parent_run"]).data.metrics
    agreement = "feedback/ai_agreement/all/choice"  # over both collections
    assert 0.0 <= metrics[f"{agreement}_low"] <= metrics[agreement] <= metrics[f"{agreement}_high"] <= 1.0


def test_a_retraining_without_new_votes_says_so_and_ends_well(simulated):
    _, place, *_ = simulated
    done = run(["rlhf", "retrain"], place / "checkout")
    assert done.returncode == 0, done.stderr
    assert "0 new votes since event" in done.stdout


def test_an_ai_labeler_alone_waits_for_no_vote_and_learns_from_none(simulated):
    _, place, *_ = simulated
    home = place / "checkout"
    values = ["retrain.labels=ai", "retrain.start=sft", "preferences.num_prompts=40"]
    options = [word for value in values for word in ("-S", value)]
    done = run(["rlhf", "retrain", *options], home, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    made = open_client(home).get_model_version_by_alias("rlhf-policy", "candidate").tags
    assert (made["retrain.labels"], made["retrain.start"]) == ("ai", "sft")
    assert not any(name.startswith("feedback.") for name in made), "it used no vote up"
    metrics = json.loads(
        run(["git", "show", f"{made['rlhf.branch']}:reports/preferences/metrics.json"], home).stdout
    )
    assert metrics["preferences/num_human_pairs_train"] == metrics["preferences/num_human_pairs_eval"] == 0
    assert metrics["preferences/num_ai_pairs_train"] > 0
