"""What the Prefect server does by itself: a run that has gone silent is marked as crashed.

A run whose process or machine is killed cannot say so, and an own server has nothing that notices: it would
stay "Running" for ever. Runs of deployments send a heartbeat; when three in a row are missing, so does this.
A crashed run can be retried from its page, and goes on from the last checkpoint.
"""

from __future__ import annotations

from datetime import timedelta

from prefect.automations import Automation
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from flows.up import HEARTBEAT_SECONDS

NAME = "rlhf: mark silent runs as crashed"
BEATS_MISSED = 3
HEARTBEAT = "prefect.flow-run.heartbeat"
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
    """Make the automation on the server that PREFECT_API_URL names, in place of an older one of its name."""
    wanted = crash_silent_runs()
    try:
        found = Automation.read(name=NAME)
    except ValueError:  # there is none
        wanted.create()
        return
    wanted.id = found.id
    wanted.update()
