"""What is made on a Prefect server, on a real one: deployment, schedules, automation, signs of life."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from prefect import flow
from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.schedules import CronSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import Completed, Running, Scheduled
from prefect.testing.utilities import prefect_test_harness

from flows import automations, deploy, retraining, slots
from tasks.schedule import covered_by


@pytest.fixture(scope="module")
def client():
    with prefect_test_harness(server_startup_timeout=180), get_client(sync_client=True) as found:
        yield found


@pytest.fixture(scope="module")
def deployment(client, root):
    deploy.make_pool()
    deploy.deploy(root)
    return client.read_deployment_by_name("train/train")


def test_a_schedule_outlives_the_next_deployment(client, deployment, root):
    weekly = CronSchedule(cron="0 3 * * 1", timezone="Europe/Berlin")
    client.create_deployment_schedules(deployment.id, [(weekly, True)])
    (made,) = client.read_deployment_schedules(deployment.id)
    client.update_deployment_schedule(deployment.id, made.id, active=False)
    for _ in range(2):
        deploy.deploy(root)
    (kept,) = client.read_deployment_schedules(deployment.id)
    assert kept.schedule == weekly
    assert not kept.active


def test_deployment_has_the_form_and_sends_heartbeats_from_any_worker(deployment):
    schema = deployment.parameter_openapi_schema
    assert schema["properties"]["ppo"]["title"] == "PPO"
    assert "params.yaml: 0.05" in schema["definitions"]["PPOForm"]["properties"]["kl_coef"]["description"]
    assert deployment.job_variables["env"] == {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}


def test_automation_is_made_once_left_alone_and_mended(client, monkeypatch):
    automations.ensure()
    first = Automation.read(name=automations.NAME)
    assert first.trigger.within == timedelta(seconds=90)
    automations.ensure()
    again = Automation.read(name=automations.NAME)
    assert again.trigger.model_dump() == first.trigger.model_dump()

    monkeypatch.setattr(automations, "BEATS_MISSED", 4)
    updates = []
    update = Automation.update
    monkeypatch.setattr(Automation, "update", lambda self: (updates.append(self.id), update(self)))
    automations.ensure()
    automations.ensure()
    assert updates == [first.id]
    assert Automation.read(name=automations.NAME).trigger.within == timedelta(seconds=120)


def test_every_run_of_a_deployment_that_has_not_ended_is_asked_for_a_sign_of_life(
    client, deployment, monkeypatch
):
    sent = []
    monkeypatch.setattr(automations, "emit_event", lambda name, resource: sent.append((name, resource)))

    @flow
    def by_hand():
        pass

    runs = [client.create_flow_run_from_deployment(deployment.id) for _ in range(3)]
    for run, state in zip(runs, (Running(), Completed(), Scheduled()), strict=True):
        client.set_flow_run_state(run.id, state, force=True)
    without_heartbeat = client.create_flow_run(by_hand, state=Running())
    asked = automations.ask_for_life()
    assert asked == [str(runs[0].id)]
    assert str(without_heartbeat.id) not in asked
    ((name, resource),) = sent
    assert name == "prefect.flow-run.heartbeat"
    assert resource["prefect.resource.id"] == f"prefect.flow-run.{runs[0].id}"


@pytest.fixture(scope="module")
def retraining_deployment(client, deployment, root):
    for _ in range(2):
        retraining.deploy_all(root)
    return client.read_deployment_by_name("retrain/retrain")


def test_retraining_runs_one_at_a_time_and_starts_when_a_collection_is_done(client, retraining_deployment):
    limit = retraining_deployment.global_concurrency_limit
    assert limit.limit == 1
    assert retraining_deployment.concurrency_options.collision_strategy == "ENQUEUE"
    found = Automation.read(name=retraining.NAME)
    assert found.trigger.expect == {"rlhf.feedback.ready"}
    (action,) = found.actions
    assert (action.type, action.deployment_id) == ("run-deployment", retraining_deployment.id)


def test_slots_of_a_schedule_are_seen_as_the_server_has_them(client, retraining_deployment):
    """Runs made by the server's own scheduler: two missed, one that began, one skipped, one by hand."""
    first = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=4)
    client.create_deployment_schedules(retraining_deployment.id, [(CronSchedule(cron="0 * * * *"), True)])
    body = {"start_time": first.isoformat(), "end_time": (first + timedelta(hours=3)).isoformat()}
    answer = client.request(
        "POST",
        "/deployments/{id}/schedule",
        path_params={"id": retraining_deployment.id},
        json=body | {"min_runs": 3, "max_runs": 3},
    )
    answer.raise_for_status()
    wanted = {"deployment_id": {"any_": [str(retraining_deployment.id)]}}
    due = client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate(wanted), sort=FlowRunSort.EXPECTED_START_TIME_ASC
    )
    one, two, three = due[:3]
    by_hand = client.create_flow_run_from_deployment(retraining_deployment.id)
    for run, states in (
        (one, (Running(), Completed())),
        (two, (Running(), Completed(name="Skipped"))),
        (three, (Running(),)),
        (by_hand, (Running(),)),
    ):
        for state in states:
            client.set_flow_run_state(run.id, state, force=True)
    own, others = slots.seen_by(three.id, retraining_deployment.id)
    assert own.due == three.expected_start_time
    assert own.by_itself
    by_id = {found.run: found for found in others}
    assert by_id[str(one.id)].state == "done"
    assert by_id[str(two.id)].state == "skipped"
    assert by_id[str(by_hand.id)].by_itself is False
    assert covered_by(own, others).run == str(one.id), "missed together, and the first did the work"
    assert covered_by(*slots.seen_by(by_hand.id, retraining_deployment.id)) is None
