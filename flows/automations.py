"""What the Prefect server does by itself: a run that has gone silent is marked as crashed.

A run whose process or machine is killed cannot say so, and an own server has nothing that notices: it would
stay "Running" for ever. Runs of deployments send a heartbeat; when three in a row are missing, so does this.
A crashed run can be retried from its page, and goes on from the last checkpoint.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import StateType
from prefect.events import emit_event
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from flows.settings import HEARTBEAT_SECONDS

NAME = "rlhf: mark silent runs as crashed"
BEATS_MISSED = 3
HEARTBEAT = "prefect.flow-run.heartbeat"
ALIVE = ("RUNNING", "PENDING", "CANCELLING")
ENDS = ("Completed", "Failed", "Cancelled", "Crashed", "Paused", "Suspended")


def crash_silent_runs() -> Automation:
    """Fires for each run by itself, once neither a heartbeat nor an end has followed a heartbeat."""
    return Automation(
        name=NAME,
        description="A run that sends no heartbeat is gone. Retry goes on from its last checkpoint.",
        trigger=EventTrigger(
            after={HEARTBEAT},
            expect={HEARTBEAT, *(f"prefect.flow-run.{state}" for state in ENDS)},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=BEATS_MISSED * HEARTBEAT_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message="No sign of life: process or machine is gone. Retry goes on from the checkpoint.",
            )
        ],
    )


def ensure() -> None:
    """Make the automation on the server that PREFECT_API_URL names, in place of a different one of its name.

    One that is as it should be is left alone: to change it would forget which runs it is waiting for.
    """
    wanted = crash_silent_runs()
    try:
        found = Automation.read(name=NAME)
    except ValueError:  # there is none
        wanted.create()
        return
    if _meaning(found) != _meaning(wanted):
        wanted.id = found.id
        wanted.update()


def _meaning(automation: Automation) -> dict[str, Any]:
    names = {"name", "description", "enabled", "trigger", "actions"}
    found = automation.model_dump(mode="json", include=names, exclude={"trigger": {"id"}})
    for key in ("after", "expect", "for_each"):  # sets, written in any order
        found["trigger"][key] = sorted(found["trigger"][key])
    return found


def ask_for_life() -> list[str]:
    """Wait, from now on, for a heartbeat of each run that has not ended. Returns their ids.

    A server that was away for minutes forgets, as it starts, which runs it waited for: those that died
    meanwhile would stay "Running". A heartbeat in the name of each makes the automation wait for the next.
    """
    with get_client(sync_client=True) as client:
        filters = {"state": {"type": {"any_": ALIVE}}, "deployment_id": {"is_null_": False}}
        runs = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(filters))
    for run in runs:
        resource = {"prefect.resource.id": f"prefect.flow-run.{run.id}", "prefect.resource.name": run.name}
        emit_event(HEARTBEAT, resource=resource)
    return [str(run.id) for run in runs]
