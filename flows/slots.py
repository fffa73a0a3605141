"""The runs of the deployment that this flow run belongs to, as `tasks.schedule` sees them."""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.runtime import deployment, flow_run

from tasks.schedule import DONE, FAILED, GONE, RUNNING, SCHEDULED, SKIPPED, Slot

STATES = {
    StateType.SCHEDULED: SCHEDULED,
    StateType.PENDING: SCHEDULED,
    StateType.PAUSED: RUNNING,
    StateType.RUNNING: RUNNING,
    StateType.CANCELLING: GONE,
    StateType.CANCELLED: GONE,
    StateType.CRASHED: GONE,
    StateType.COMPLETED: DONE,
    StateType.FAILED: FAILED,
}
PAGE = 200
SKIPPED_NAME = "Skipped"  # of the state Completed
NOBODY = Slot("", datetime.min, by_itself=False)


def seen() -> tuple[Slot, list[Slot]]:
    """This flow run, and the runs of its deployment that began since it was due. Nothing without one."""
    if not deployment.id:
        return NOBODY, []
    return seen_by(UUID(str(flow_run.id)), UUID(str(deployment.id)))


def seen_by(run_id: UUID, deployment_id: UUID) -> tuple[Slot, list[Slot]]:
    with get_client(sync_client=True) as client:
        own = slot_of(client.read_flow_run(run_id))
        wanted = {
            "deployment_id": {"any_": [str(deployment_id)]},
            # A little earlier: the server's clock and ours may differ, and `covered_by` looks again.
            "start_time": {"after_": (own.due - timedelta(minutes=1)).isoformat()},
        }
        found: list[FlowRun] = []
        while True:
            page = client.read_flow_runs(
                flow_run_filter=FlowRunFilter.model_validate(wanted),
                sort=FlowRunSort.START_TIME_ASC,
                limit=PAGE,
                offset=len(found),
            )
            found += page
            if len(page) < PAGE:
                return own, [slot_of(run) for run in found]


def slot_of(run: FlowRun) -> Slot:
    """A run as a slot; one that a person started, from the page or a shell, looks by itself."""
    assert run.state is not None
    due = run.expected_start_time
    assert due is not None
    state = SKIPPED if run.state.name == SKIPPED_NAME else STATES[run.state.type]
    made_by = run.created_by.type if run.created_by else ""
    return Slot(str(run.id), due, run.start_time, state, run.auto_scheduled or made_by == "AUTOMATION")
