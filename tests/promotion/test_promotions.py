"""Promotions in a registry of toy policies: gate, waiting, decisions, races, the way back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import yaml

from rlhf_core.errors import InputError
from rlhf_core.mlflow_writer import experiment_id, open_client, registered_model_dir
from rlhf_core.promotion.duel import MEASUREMENTS, RESULTS
from tasks import decisions, products, promotion
from tasks.ledger import Ledger

from .prepared import write_prepared

NAME = "rlhf-policy"


def dvc(where, *words):
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *words], cwd=where, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def held(tiny_model_dir, tmp_path_factory):
    """A workspace in which DVC holds an SFT model and data, with an empty registry; and their md5."""
    root = tmp_path_factory.mktemp("held")
    dvc(root, "init", "--no-scm", "-q")
    shutil.copytree(tiny_model_dir, root / "models" / "sft")
    shutil.copytree(tiny_model_dir, root / "models" / "reward")
    write_prepared(root / "data" / "prepared")
    outputs = ("models/sft", "models/reward", "data/prepared")
    dvc(root, "add", "-q", *outputs)
    tags = {}
    for output in outputs:
        (out,) = yaml.safe_load((root / f"{output}.dvc").read_text())["outs"]
        tags[f"dvc.{output.replace('/', '.')}"] = out["md5"]
        shutil.rmtree(root / output)
    open_client(root)  # the tables of MLflow, made once
    return root, tags


@pytest.fixture
def place(held, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root, tags = held
    home = tmp_path / "home"
    shutil.copytree(root, home)
    return home, tags


def register(home, tags, directory):
    """A version whose weights are those in `directory`, with the alias candidate."""
    client = open_client(home)
    run = client.create_run(experiment_id(client, home))
    try:
        client.create_registered_model(NAME)
    except Exception:
        assert client.get_registered_model(NAME)
    source = home / "versions" / run.info.run_id
    shutil.copytree(directory, source / "artifacts" / "policy")
    made = client.create_model_version(NAME, f"file://{source}", tags=tags | {"reward.accuracy": "0.7"})
    client.set_registered_model_alias(NAME, "candidate", made.version)
    return str(made.version)


@pytest.fixture
def wins(monkeypatch):
    """Comparisons without models: the candidate wins so many of 24 prompts. For what follows a comparison."""
    state = {"wins": 22, "calls": 0}

    def fake(root, params, spec, place, on_line):
        state["calls"] += 1
        out = place / "duel"
        out.mkdir(parents=True)
        rows = []
        for i in range(24):
            won = float(i < state["wins"])
            answer = {"text": "nice", "score": None}
            row = {"prompt": f"p{i}", "candidate": [answer], "opponent": [answer], "outcomes": [[won, won]]}
            rows.append(json.dumps(row))
        facts = {"length": 5.0, "distinct_2": 0.5, "repeated_4": 0.0, "refusal_rate": 0.0, "toxic_rate": 0.0}
        tree = {"candidate": facts, "opponent": facts, "kl": 1.0, "perplexity": 5.0, "sft_perplexity": 5.0}
        tree |= {"reward_accuracy": spec.reward_accuracy, "prompts_sha256": "x", "num_demonstrations": 4}
        (out / RESULTS).write_text("\n".join(rows) + "\n")
        (out / MEASUREMENTS).write_text(json.dumps(tree))

    monkeypatch.setattr(promotion, "_run_duel", fake)
    return state


def compared(home, params, version="", **origin):
    begun = promotion.open_promotion(home, params, version, origin)
    return promotion.compare(home, params, begun, lambda line: None)


def aliases(home):
    return Ledger(open_client(home), NAME).aliases()


def tags_of(home, version):
    return open_client(home).get_model_version(NAME, version).tags


def test_first_promotion_compares_real_models_with_sft_and_the_champion_is_loaded_by_alias(
    place,
    duel_params,
    nice_model_dir,
):
    home, tags = place
    register(home, tags, nice_model_dir)
    found = compared(home, duel_params)
    assert (found.state, found.outcome, found.opponent) == ("pending", "pass", "")
    assert not list((home / ".rlhf" / "promotions").iterdir())  # what was fetched is gone
    assert "against its SFT model" in promotion.scorecard_text(home, found.run_id)
    said = decisions.settle_decision(home, found.run_id, "approve", "Ann", "reads well")
    assert said == f"{NAME} version 1 is the champion (by Ann)"
    assert aliases(home) == {"candidate": "1", "champion": "1"}
    champion = registered_model_dir(f"models:/{NAME}@champion", home)
    weights = "model.safetensors"
    assert (champion / weights).read_bytes() == (nice_model_dir / weights).read_bytes()
    kept = tags_of(home, "1")
    assert kept["gate.verdict"] == "pass"
    assert (kept["promotion.by"], kept["promotion.reason"]) == ("Ann", "reads well")
    assert kept["promotion.decision"] == "promote"
    assert kept["gate.opponent"] == "SFT"
    assert float(kept["gate.win_rate_low"]) > 0.5
    # The same policy again, as another version, against the champion: all ties.
    register(home, tags, nice_model_dir)
    again = compared(home, duel_params)
    assert (again.state, again.outcome, again.opponent) == ("failed", "fail", "1")
    with pytest.raises(InputError, match="the gate does not hold, so it cannot be approved"):
        decisions.settle_decision(home, again.run_id, "approve", "Ann", "please")
    assert aliases(home)["candidate"] == "2"  # keeps it until somebody rejects


def test_promoted_twice_and_rolled_back_twice(place, duel_params, nice_model_dir, wins):
    home, tags = place
    for number in ("1", "2", "3"):
        assert register(home, tags, nice_model_dir) == number
        found = compared(home, duel_params)
        decisions.settle_decision(home, found.run_id, "approve", "Ann", "better")
    assert aliases(home) == {"candidate": "3", "champion": "3", "previous": "2"}
    assert "version 2 is the champion again" in decisions.roll_back(home, NAME, "Bob", "complaints")
    assert aliases(home) == {"candidate": "3", "champion": "2", "previous": "1"}
    assert tags_of(home, "3")["rollback.reason"] == "complaints"
    decisions.roll_back(home, NAME, "Bob", "still")
    assert aliases(home) == {"candidate": "3", "champion": "1"}
    with pytest.raises(InputError, match="no champion before 1 to go back to"):
        decisions.roll_back(home, NAME, "Bob", "more")
    with pytest.raises(InputError, match="needs a name and a reason"):
        decisions.roll_back(home, NAME, " ", "more")


def test_of_two_promotions_at_once_one_wins_and_the_other_says_so(
    place,
    duel_params,
    nice_model_dir,
    wins,
):
    home, tags = place
    first, second = register(home, tags, nice_model_dir), register(home, tags, nice_model_dir)
    one, two = compared(home, duel_params, first), compared(home, duel_params, second)
    decisions.settle_decision(home, two.run_id, "approve", "Bob", "mine")
    message = "version 1 was compared with its SFT model, but version 2 is the champion now, set by Bob"
    with pytest.raises(decisions.LostPromotion, match=message):
        decisions.settle_decision(home, one.run_id, "approve", "Ann", "mine")
    assert aliases(home)["champion"] == "2"
    assert promotion.read(home, one.run_id).state == "lost"
    third = compared(home, duel_params, first)  # compares anew, with the new champion
    assert third.opponent == "2"


def test_an_alias_moved_by_hand_since_the_comparison_stops_it(
    place,
    duel_params,
    nice_model_dir,
    wins,
):
    home, tags = place
    for _ in range(3):
        register(home, tags, nice_model_dir)
    waiting = compared(home, duel_params, "1")
    open_client(home).set_registered_model_alias(NAME, "champion", "3")
    with pytest.raises(decisions.LostPromotion, match="version 3 is the champion now"):
        decisions.settle_decision(home, waiting.run_id, "approve", "Ann", "ok")
    again = compared(home, duel_params, "1")
    decisions.settle_decision(home, again.run_id, "approve", "Ann", "ok")
    assert aliases(home) == {"candidate": "3", "champion": "1", "previous": "3"}


def test_a_promotion_is_decided_once(place, duel_params, nice_model_dir, wins):
    home, tags = place
    register(home, tags, nice_model_dir)
    found = compared(home, duel_params)
    said = decisions.settle_decision(home, found.run_id, "reject", "Ann", "too short")
    assert "rejected by Ann: too short" in said
    assert aliases(home) == {}
    kept = tags_of(home, "1")
    assert (kept["gate.verdict"], kept["promotion.decision"]) == ("pass", "reject")
    again = decisions.settle_decision(home, found.run_id, "reject", "Bob", "me too")
    assert "was rejected already, by Ann" in again
    with pytest.raises(decisions.LostPromotion, match="was rejected already, by Ann"):
        decisions.settle_decision(home, found.run_id, "approve", "Bob", "no!")
    assert aliases(home) == {}


def test_who_dies_after_deciding_is_taken_up_by_the_next(
    place, duel_params, nice_model_dir, wins, monkeypatch
):
    home, tags = place
    register(home, tags, nice_model_dir)
    found = compared(home, duel_params)

    def dying(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(decisions, "_carry_out", dying)
        with pytest.raises(KeyboardInterrupt):
            decisions.settle_decision(home, found.run_id, "approve", "Ann", "ok")
    assert "champion" not in aliases(home)
    said = decisions.settle_decision(home, found.run_id, "approve", "Bob", "ok")
    assert "was promoted already, by Ann" in said
    assert aliases(home)["champion"] == "1"
    assert tags_of(home, "1")["promotion.by"] == "Ann"
    assert promotion.read(home, found.run_id).state == "promoted"


def test_killed_while_waiting_or_comparing_it_is_taken_up_again(
    place,
    duel_params,
    nice_model_dir,
    wins,
    monkeypatch,
):
    home, tags = place
    register(home, tags, nice_model_dir)
    real = promotion._run_duel

    def dying(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(promotion, "_run_duel", dying)
    with pytest.raises(KeyboardInterrupt):
        compared(home, duel_params, **{"prefect.flow_run": "f1"})
    assert aliases(home) == {"candidate": "1"}
    monkeypatch.setattr(promotion, "_run_duel", real)
    begun = promotion.open_promotion(home, duel_params, "", {"prefect.flow_run": "f1"})
    assert begun.state == "comparing"
    done = promotion.compare(home, duel_params, begun, lambda line: None)
    assert done.run_id == begun.run_id
    assert (done.state, wins["calls"]) == ("pending", 1)
    # The process that waits dies; the flow run is started again and finds its verdict.
    later = compared(home, duel_params, **{"prefect.flow_run": "f1"})
    assert (later.run_id, later.state, wins["calls"]) == (done.run_id, "pending", 1)
    assert promotion.find_waiting(home, NAME, "").run_id == done.run_id
    assert promotion.find_waiting(home, NAME, done.short_id).run_id == done.run_id
    with pytest.raises(InputError, match="none that waits has this id"):
        promotion.find_waiting(home, NAME, "zzz")


def judged_by(params, **changes):
    return params.model_copy(update={"promotion": params.promotion.model_copy(update=changes)})


@pytest.mark.parametrize("judge", ["reward_model", "function"])
def test_a_judge_that_was_optimised_is_proxy_only_and_auto_is_refused(
    place,
    duel_params,
    nice_model_dir,
    wins,
    judge,
):
    home, tags = place
    target = "taste:nice" if judge == "function" else ""
    params = judged_by(duel_params, judge=judge, judge_target=target)
    register(home, tags | {"ppo.reward_function": "taste:nice"}, nice_model_dir)
    found = compared(home, params)
    assert (found.state, found.outcome) == ("pending", "proxy only")
    assert "the candidate was optimised against" in found.tags["gate.reasons"]
    with pytest.raises(InputError, match="a person has to decide"):
        decisions.settle_decision(home, found.run_id, "approve", decisions.AUTO, "the gate holds")
    assert "champion" not in aliases(home)
    decisions.settle_decision(home, found.run_id, "approve", "Ann", "read twenty of them")
    assert aliases(home)["champion"] == "1"


def test_another_reward_model_is_a_judge_of_its_own(
    place,
    duel_params,
    nice_model_dir,
    wins,
):
    home, tags = place
    client = open_client(home)
    client.create_registered_model(f"{NAME}-reward")
    client.create_model_version(f"{NAME}-reward", "file:///none", tags={"dvc.md5": tags["dvc.models.sft"]})
    register(home, tags | {"dvc.models.reward": "0" * 32 + ".dir"}, nice_model_dir)
    found = compared(home, judged_by(duel_params, judge="reward_model", judge_target="1"))
    assert found.outcome == "pass"
    with pytest.raises(InputError, match="has no such version"):
        compared(home, judged_by(duel_params, judge="reward_model", judge_target="7"))


def test_what_cannot_be_promoted_is_told(place, duel_params, nice_model_dir, wins):
    home, _tags = place
    with pytest.raises(InputError, match="no such registered model"):
        promotion.open_promotion(home, duel_params, "", {})
    register(home, {}, nice_model_dir)
    with pytest.raises(InputError, match="there is no version 9"):
        promotion.open_promotion(home, duel_params, "9", {})
    with pytest.raises(InputError, match=r"has no tag dvc.models.sft"):
        compared(home, duel_params)
    open_client(home).set_registered_model_alias(NAME, "champion", "1")
    with pytest.raises(InputError, match="version 1 is the champion already"):
        promotion.open_promotion(home, duel_params, "", {})
    open_client(home).delete_registered_model_alias(NAME, "candidate")
    with pytest.raises(InputError, match="no version has the alias candidate"):
        promotion.open_promotion(home, duel_params, "", {})


def test_products_come_from_the_remote_and_damaged_ones_are_fetched_again(place, tmp_path):
    home, tags = place
    md5 = tags["dvc.models.sft"]
    dvc(home, "remote", "add", "-d", "there", str(tmp_path / "remote"))
    dvc(home, "push", "-q")
    cache = home / ".dvc" / "cache" / "files" / "md5"
    whole = products.fetch(home, md5, tmp_path / "one", "the SFT model")
    assert (whole / "model.safetensors").is_file()
    shutil.rmtree(cache)
    again = products.fetch(home, md5, tmp_path / "two", "the SFT model")
    for path in whole.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
    entry = next(path for path in cache.glob("*/*") if path.suffix != ".dir")
    content = entry.read_bytes()
    entry.chmod(0o644)
    entry.unlink()
    entry.write_bytes(content[:-1] + b"?")  # a file damaged in the cache
    mended = products.fetch(home, md5, tmp_path / "mended", "the SFT model")
    assert {p.name: p.read_bytes() for p in mended.iterdir()} == {
        p.name: p.read_bytes() for p in again.iterdir()
    }
    with pytest.raises(InputError, match=r"the SFT model: md5 0000.*is neither in the DVC cache"):
        products.fetch(home, "0" * 32 + ".dir", tmp_path / "three", "the SFT model")
