"""From the form to a live policy on one `rlhf up`: real servers, a real worker, the smoke profile.

Two runs at once, one cancelled, one killed in four ways and taken up again; promotion by a person, a second
one that comes too late, and the way back. Only what the pages can do is done, through the API that they use.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import subprocess
import urllib.error

import pytest
import yaml
from mlflow import MlflowClient

from rlhf_core.stages import STAGES

from .checkouts import commit, make_checkout, processes_below, run, wait_for
from .services import RunHere, Services, alive, kill, serving
from .taste import LEARN, TASTE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CANCEL_SECONDS = 30
CRASH_SECONDS = 300
LONG_SFT = ["sft.num_epochs=30", "sft.eval_every=100", "sft.checkpoint_seconds=1"]
SUSPENDED = "Suspended"


@pytest.fixture(scope="module")
def services(root, tmp_path_factory):
    checkout = make_checkout(root, tmp_path_factory.mktemp("end-to-end") / "rlhf")
    (checkout / "taste.py").write_text(TASTE)
    options = [word for key, value in LEARN.items() for word in ("-S", f"{key}={value}")]
    done = run(["rlhf", "params", "--profile", "smoke", *options], checkout)
    assert done.returncode == 0, done.stderr
    commit(checkout, "a taste, and a profile")
    with serving(checkout, checkout.parent / "up.log") as found:
        yield found


def test_from_the_form_to_a_live_policy_and_back(services):
    what_breaks_a_rule_is_refused(services)
    strong, doomed = two_runs_at_once(services)
    training_and_server_are_killed(services, strong)
    one_is_cancelled(services, doomed, strong)
    worker_and_machine_are_killed(services, strong)
    weak = another_runs_beside_it_and_both_end_well(services, strong)
    what_was_killed_went_on(strong)
    everything_is_seen(services, weak, strong)
    runs_are_listed_and_compared(services, weak, strong)
    versions = versions_of(services, weak, strong)
    first, late = (waiting_promotion(services, version, "its SFT model") for version in versions)
    waiting_outlives_a_restart(services, first, late)
    the_first_is_approved(services, first, *versions)
    the_other_comes_too_late(services, late, *versions)
    it_meets_the_champion_and_takes_its_place(services, *versions)
    and_is_rolled_back(services, *versions)


def what_breaks_a_rule_is_refused(services: Services) -> None:
    """A bound of one value by the form, a rule between two by the run, in its first seconds."""
    prefect = services.prefect
    with pytest.raises(urllib.error.HTTPError, match=r"409|422"):
        prefect.start("train", ppo={"kl_coef": -1})
    wrong = prefect.start("train", ppo={"rollout_batch_size": 33})
    assert prefect.follow(wrong, 120) == "FAILED"
    said = prefect.get(f"flow_runs/{wrong}")["state"]["message"]
    assert "ppo.rollout_batch_size (33) must be a multiple" in said


def two_runs_at_once(services: Services) -> tuple[RunHere, RunHere]:
    """In a worktree each. One learns well; the other would train for hours."""
    prefect, checkout = services.prefect, services.checkout
    more = {"ppo": {"kl_coef": 0.04, "num_updates": 12}, "overrides": LONG_SFT}
    hours = {"sft": {"num_epochs": 5000}, "overrides": LONG_SFT[1:]}
    runs = [RunHere(checkout, prefect.start("train", **typed)) for typed in (more, hours)]
    wait_for(lambda: all(one.processes() for one in runs), 300)
    assert [prefect.state(one.id) for one in runs] == ["RUNNING"] * 2
    assert runs[0].worktree != runs[1].worktree
    return runs[0], runs[1]


def training_and_server_are_killed(services: Services, one: RunHere) -> None:
    """Neither ends the run: the stage is tried again from its checkpoint, the server is started again."""
    prefect = services.prefect
    wait_for(lambda: one.checkpoints("sft"), 600)
    (training,) = (pid for pid, command in one.processes().items() if "rlhf sft" in command)
    kill(training)
    wait_for(lambda: len(one.first_steps("sft")) == 2, 300)
    begun, gone_on = one.first_steps("sft")
    assert begun == 0 < gone_on
    assert prefect.state(one.id) == "RUNNING"

    below = processes_below(services.checkout)
    (server,) = (pid for pid, command in below.items() if "prefect server start" in command)
    before = one.processes()
    kill(server)
    wait_for(lambda: "prefect ended with status -9; starting it again" in services.log.read_text(), 60)
    assert set(before) & set(one.processes())
    wait_for(lambda: answers(services, one), 120)
    assert prefect.state(one.id) == "RUNNING"


def answers(services: Services, one: RunHere) -> str:
    with contextlib.suppress(OSError):
        return services.prefect.state(one.id)
    return ""


def everything_is_seen(services: Services, one: RunHere, before: RunHere) -> None:
    """Tasks, artifacts and links of a run that has ended, and what its branch keeps.

    Its `pretrain` was taken over from the run `before`, which shows the curves.
    """
    prefect, checkout = services.prefect, services.checkout
    values = one.committed("params.yaml")["ppo"]
    assert (values["kl_coef"], values["num_updates"]) == (0.06, 5)
    assert (checkout / "params.yaml").read_text() == run(["git", "show", "HEAD:params.yaml"], checkout).stdout
    assert set(STAGES) <= set(prefect.tasks(one.id))

    artifacts = prefect.artifacts(one.id)
    for stage in STAGES:
        assert artifacts[f"{stage}-progress"] == 100
        assert json.loads(artifacts[f"{stage}-metrics"])
        log = one.kept / ".rlhf" / "runs" / stage / "output.log"
        assert f"`{log}`" in artifacts[f"{stage}-log"]
        assert log.is_file()
    drawn = artifacts | {"pretrain-curves": prefect.artifacts(before.id)["pretrain-curves"]}
    for stage in ("pretrain", "sft", "reward", "ppo"):
        picture = re.fullmatch(r"!\[.*\]\(data:image/png;base64,(.*)\)", drawn[f"{stage}-curves"])
        assert base64.b64decode(picture.group(1)).startswith(b"\x89PNG")
    tables = ("sft-training-samples", "preferences-preference-samples", "reward-held-out-pairs")
    for table in (*tables, "ppo-rollout-samples", "evaluate-samples"):
        assert json.loads(artifacts[table])

    client = MlflowClient(services.mlflow)
    parent = client.get_run(re.search(r"/runs/(\w+)", artifacts["mlflow-run"]).group(1))
    assert f"/flow-runs/flow-run/{one.id})" in parent.data.tags["mlflow.note.content"]
    assert services.mlflow in artifacts["ppo-log"]
    child = re.search(r"/runs/(\w+)/artifacts/output.log", artifacts["ppo-log"]).group(1)
    assert client.get_run(child).data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert "output.log" in [file.path for file in client.list_artifacts(child)]


def one_is_cancelled(services: Services, one: RunHere, beside: RunHere) -> None:
    """The training and all that it started are gone in time; the run beside it goes on."""
    prefect = services.prefect
    wait_for(lambda: one.checkpoints("sft"), 600)
    victims = one.processes()
    assert any("dvc" in command for command in victims.values())
    assert any("rlhf sft" in command for command in victims.values())
    prefect.cancel(one.id)
    wait_for(lambda: not any(alive(pid) for pid in victims), CANCEL_SECONDS)
    wait_for(lambda: prefect.state(one.id) == "CANCELLED", CANCEL_SECONDS)
    assert one.processes() == {}
    assert json.loads((one.kept / "run.json").read_text())["state"] == "stopped"
    assert prefect.state(beside.id) == "RUNNING"
    assert beside.processes() != {}


def worker_and_machine_are_killed(services: Services, one: RunHere) -> None:
    """Each time the run is marked as crashed, and Retry goes on from the last checkpoint."""
    wait_for(lambda: one.checkpoints("ppo"), 900)
    below = processes_below(services.checkout).items()
    victims = [pid for pid, name in below if "prefect worker" in name or "prefect.engine" in name]
    assert len(victims) >= 2
    for pid in victims:
        kill(pid)
    wait_for(lambda: services.prefect.state(one.id) == "CRASHED", CRASH_SECONDS)
    assert "worker ended with status -9; starting it again" in services.log.read_text()
    assert one.processes() == {}  # nothing trains unseen
    reached = one.checkpoints("ppo")
    services.prefect.retry(one.id)

    wait_for(lambda: set(one.checkpoints("ppo")) - set(reached), 300)
    services.lose_power()
    services.start()
    wait_for(lambda: services.prefect.state(one.id) == "CRASHED", CRASH_SECONDS)
    services.prefect.retry(one.id)


def another_runs_beside_it_and_both_end_well(services: Services, one: RunHere) -> RunHere:
    """It learns a little, and takes over what the other has computed of the stages that they share."""
    little = {"ppo": {"kl_coef": 0.06, "num_updates": 5}, "reward": {}}
    other = RunHere(services.checkout, services.prefect.start("train", **little))
    for either in (one, other):
        assert services.prefect.follow(either.id) == "COMPLETED"
        assert either.worktree is None
    assert "Running stage 'pretrain'" not in other.log("pretrain")
    assert "Running stage 'sft'" in other.log("sft")
    return other


def what_was_killed_went_on(one: RunHere) -> None:
    """Each attempt began at the checkpoint of the one before; what was done was not done again."""
    assert "didn't change, skipping" in one.log("sft")
    begun, second, third = one.first_steps("ppo")
    assert begun == 0 < second < third
    assert one.committed("reports/ppo/metrics.json")["ppo/num_updates"] == 12


def runs_are_listed_and_compared(services: Services, weak: RunHere, strong: RunHere) -> None:
    names = [one.kept.name for one in (weak, strong)]
    listed = run(["rlhf", "runs"], services.checkout, COLUMNS="200").stdout
    assert listed.count("finished") == 2
    assert listed.count("stopped") == 1  # the cancelled one
    compared = run(["rlhf", "runs", "compare", *names], services.checkout, COLUMNS="200")
    assert compared.returncode == 0, compared.stderr
    assert re.search(r"ppo\.kl_coef +0\.06 +0\.04", compared.stdout)
    shown = run(["dvc", "metrics", "diff", *(f"runs/{n}" for n in names), "--json"], services.checkout)
    change = json.loads(shown.stdout)["reports/ppo/metrics.json"]["ppo/num_updates"]
    assert (change["old"], change["new"]) == (5, 12)


def versions_of(services: Services, *runs: RunHere) -> list[str]:
    """The registered version of each run, which names it, and the commit that holds its dvc.lock."""
    found = MlflowClient(services.mlflow).search_model_versions("name='rlhf-policy'")
    by_run = {version.tags["prefect.flow_run"]: version for version in found}
    assert set(by_run) == {one.id for one in runs}
    for one in runs:
        tags = by_run[one.id].tags
        assert tags["prefect.url"].endswith(one.id)
        assert tags["rlhf.branch"] == f"runs/{one.kept.name}"
        lock = run(["git", "show", f"{tags['git.commit']}:dvc.lock"], services.checkout).stdout
        assert hashlib.md5(lock.encode()).hexdigest() == tags["dvc.lock.md5"]
        assert tags["git.dirty"] == "false"
        outs = yaml.safe_load(lock)["stages"]["ppo"]["outs"]
        assert {out["path"]: out["md5"] for out in outs}["models/policy"] == tags["dvc.models.policy"]
        assert tags["reward_model"].startswith("rlhf-policy-reward/")
    return [str(by_run[one.id].version) for one in runs]


def aliases(services: Services) -> dict[str, str]:
    found = MlflowClient(services.mlflow).get_registered_model("rlhf-policy").aliases
    return {alias: str(version) for alias, version in found.items()}


def waiting_promotion(services: Services, version: str, opponent: str, known: tuple[str, ...] = ()) -> str:
    """The run of `promote` for the version, once it waits for a person; with its scorecard in the form."""
    prefect = services.prefect
    wanted = {"deployments": {"id": {"any_": [prefect.deployment("promote")["id"]]}}}

    def ours():
        found = prefect.post("flow_runs/filter", wanted)
        return [r for r in found if r["parameters"].get("version") == version and r["id"] not in known]

    (one,) = wait_for(ours, 120)
    ends = ("PAUSED", "COMPLETED", "FAILED", "CRASHED")
    wait_for(lambda: prefect.state(one["id"]) in ends, 300)
    assert prefect.get(f"flow_runs/{one['id']}")["state_name"] == SUSPENDED, prefect.logs(one["id"])[-20:]
    engines = lambda: [c for c in processes_below(services.checkout).values() if "prefect.engine" in c]  # noqa: E731
    wait_for(lambda: not engines(), 60)  # waiting holds no process
    given = prefect.post(f"flow_runs/{one['id']}/input/filter", {"prefix": "suspended", "limit": 10})
    assert any(f"version {version} against {opponent}" in str(entry["value"]) for entry in given)
    return one["id"]


def answer(services: Services, promotion: str, **typed: str) -> str:
    """What the Resume button of the waiting run's page does with its form; ACCEPT or REJECT."""
    said = services.prefect.post(f"flow_runs/{promotion}/resume", {"run_input": typed})["status"]
    if said == "ACCEPT":
        wait_for(lambda: services.prefect.state(promotion) != "PAUSED", 60)
    return said


def waiting_outlives_a_restart(services: Services, *promotions: str) -> None:
    services.stop()
    services.start()
    for one in promotions:
        assert services.prefect.get(f"flow_runs/{one}")["state_name"] == SUSPENDED


def the_first_is_approved(services: Services, promotion: str, weak: str, strong: str) -> None:
    candidate = max(weak, strong)  # the last one that was registered
    assert aliases(services) == {"candidate": candidate}
    assert answer(services, promotion, decision="approve", name="", reason="x") == "REJECT"
    assert answer(services, promotion, decision="approve", name="Ann", reason="reads well") == "ACCEPT"
    assert services.prefect.follow(promotion, 240) == "COMPLETED"
    assert aliases(services) == {"candidate": candidate, "champion": weak}
    tags = MlflowClient(services.mlflow).get_model_version("rlhf-policy", weak).tags
    assert (tags["promotion.by"], tags["promotion.reason"]) == ("Ann", "reads well")


def the_other_comes_too_late(services: Services, promotion: str, weak: str, strong: str) -> None:
    assert answer(services, promotion, decision="approve", name="Bob", reason="reads better") == "ACCEPT"
    assert services.prefect.follow(promotion, 240) == "FAILED"
    said = services.prefect.get(f"flow_runs/{promotion}")["state"]["message"]
    assert f"version {weak} is the champion now, set by Ann" in said
    assert aliases(services) == {"candidate": max(weak, strong), "champion": weak}


def it_meets_the_champion_and_takes_its_place(services: Services, weak: str, strong: str) -> None:
    prefect = services.prefect
    wanted = {"deployments": {"id": {"any_": [prefect.deployment("promote")["id"]]}}}
    known = tuple(one["id"] for one in prefect.post("flow_runs/filter", wanted))
    prefect.start("promote", version=strong)
    again = waiting_promotion(services, strong, f"champion {weak}", known)
    done = shell(services, "rlhf", "approve", "--name", "Bob", "--reason", "beats it")
    assert f"version {strong} is the champion, in place of version {weak}" in done.stdout, done.stderr
    assert prefect.follow(again, 240) == "COMPLETED"  # what waited for the form ends too
    assert aliases(services) == {"candidate": max(weak, strong), "champion": strong, "previous": weak}


def and_is_rolled_back(services: Services, weak: str, strong: str) -> None:
    back = services.prefect.start("rollback", name="Ann", reason="complaints")
    assert services.prefect.follow(back, 240) == "COMPLETED"
    assert aliases(services) == {"candidate": max(weak, strong), "champion": weak}
    tags = MlflowClient(services.mlflow).get_model_version("rlhf-policy", strong).tags
    assert (tags["rollback.by"], tags["rollback.reason"]) == ("Ann", "complaints")
    nothing = shell(services, "rlhf", "rollback", "--name", "Ann", "--reason", "x")
    assert nothing.returncode == 2
    assert "there is no champion before" in nothing.stderr


def shell(services: Services, *command: str) -> subprocess.CompletedProcess[str]:
    """A command in the checkout, told where MLflow's server is."""
    return run(list(command), services.checkout, MLFLOW_TRACKING_URI=services.mlflow)
