"""Looks at open collections: shows how far they are, ends those whose time has come, and tells of it once.

The event has an id made of the collection's, so a server that has it already takes no second one; and only
when the server says that it has the event is that written down. A watcher that dies at any place is followed
by the next, see `feedback.watching.claim`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactCollectionFilter,
    ArtifactCollectionFilterKey,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.events import emit_event
from prefect.events.filters import EventFilter, EventIDFilter, EventOccurredFilter
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL

from feedback.store import Store
from feedback.watching import (
    DEADLINE,
    Progress,
    Watched,
    claim,
    expected_end,
    list_collections,
    note_announced,
    progress,
    settle,
)
from rlhf_core.errors import RLHFError
from tasks.asking import open_store
from tasks.events import FEEDBACK_READY

WATCH = "watch_feedback"  # flow and deployment
CONFIRM_SECONDS = 60.0  # for the server to say that it has an event; well below a claim's length


def look(root: Path, on_line: Callable[[str], None]) -> bool:
    """Look at every collection that is open, or whose end nobody was told. Returns whether one is left.

    A server that does not take the event of one does not keep the others from being looked at.
    """
    with open_store(root) as store:
        for one in list_collections(store):
            if one.is_open or one.untold:
                try:
                    look_at(store, settle(store, one.id), on_line)
                except RLHFError as error:
                    on_line(str(error))
        return any(one.is_open or one.untold for one in list_collections(store))


def look_at(store: Store, found: Watched, on_line: Callable[[str], None]) -> None:
    """Show one collection, and tell of its end when it has come."""
    state = progress(store, found.id)
    show(found, state)
    on_line(f"{found.id}: {summary(found, state)}")
    if not found.untold:
        return
    if not PREFECT_API_URL.value():  # a server that goes with this process: nobody listens there
        on_line(f"{found.id}: no Prefect server is named (PREFECT_API_URL), so nobody is told")
        return
    if tell(store, found):
        on_line(f"{found.id}: sent {FEEDBACK_READY}")


def tell(store: Store, found: Watched) -> bool:
    """Send the event of the collection's end, unless it was sent or another watcher is at it.

    Raises RLHFError when the server does not say that it has it; the next look tries again.
    """
    if not claim(store, found.id):
        return False
    event = event_id(found)
    if not server_has(event):
        send(found, event)
        deadline = time.monotonic() + CONFIRM_SECONDS
        while not server_has(event):
            if time.monotonic() > deadline:
                raise RLHFError(f"{found.id}: the Prefect server has not taken the event; tried again later")
            time.sleep(1.0)
    note_announced(store, found.id)
    return True


def event_id(found: Watched) -> UUID:
    """Always the same for one collection; another checkout's of the same id was opened at another time."""
    return uuid5(NAMESPACE_URL, f"{FEEDBACK_READY}/{found.id}/{found.opened.isoformat()}")


def send(found: Watched, event: UUID) -> None:
    emit_event(
        FEEDBACK_READY,
        resource={"prefect.resource.id": f"rlhf.feedback.{found.id}", "prefect.resource.name": found.id},
        payload={"project": found.id, "votes": found.votes, "reason": found.reason},
        id=event,
    )


def server_has(event: UUID) -> bool:
    """Whether the event is in the server's database."""
    long_ago = EventOccurredFilter(since=datetime(2020, 1, 1).astimezone())
    with get_client(sync_client=True) as client:
        page = client.read_events(EventFilter(id=EventIDFilter(id=[event]), occurred=long_ago), limit=1)
    return bool(page.events)


def summary(found: Watched, state: Progress) -> str:
    """One line: votes, and either the end or what is to be expected."""
    said = f"{state.votes} of {found.wanted} votes"
    if found.is_open:
        return said
    if found.reason == DEADLINE:
        return f"{said} at the deadline" if found.votes else "no votes at the deadline; closed"
    return f"{said}, ended ({found.reason})"


def percent(found: Watched, state: Progress) -> float:
    return min(100.0, 100.0 * state.votes / found.wanted)


def table(found: Watched, state: Progress) -> str:
    """The description of the progress artifact, in Markdown.

    People appear by their id alone: what is erased from the annotation service must not live on in Prefect.
    """
    at_pace = expected_end(found, state)
    facts = [
        ("votes", f"{state.votes} of {found.wanted}"),
        ("last 24 hours", str(state.recent)),
        ("all there, at this pace", moment(at_pace) if at_pace else "unknown: no votes lately"),
        ("deadline", moment(found.deadline) if found.deadline else "none"),
        ("opened", moment(found.opened)),
        *asked(found.about),
    ]
    if not found.is_open:
        facts[1:4] = [("ended", f"{moment(found.ended)}, {summary(found, state)}")]
    people = [(f"annotator {name}", str(count)) for name, count in state.by_annotator.items()]
    lines = [f"| {name} | {value} |" for name, value in (*facts, *people)]
    return "\n".join([f"Feedback `{found.id}`", "", "| | |", "| --- | --- |", *lines])


def asked(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was asked, and how many of it only measure; older collections held nothing out."""
    items, how = about.get("items", 0), about.get("how", "")
    if "held_out" not in about:
        return [("asked", f"{items or '?'} prompts, {how}")]
    held_out, left = about["held_out"], about["left_out"]
    facts = [
        ("asked", f"{items} of {about['wanted']} prompts"),
        ("to learn from", f"{items - held_out}, {how}"),
        ("held out, to measure by", f"{held_out}, drawn at random"),
    ]
    return facts + [("answered and left out", f"{count} x {reason}") for reason, count in left.items()]


def moment(at: datetime | None) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC" if at else ""


def show(found: Watched, state: Progress) -> None:
    """One progress artifact a collection, changed in place however many runs look at it."""
    key = f"feedback-{found.id}".lower()
    there = latest_artifact(key)
    if there is None:
        create_progress_artifact(percent(found, state), key=key, description=table(found, state))
    else:
        update_progress_artifact(there, percent(found, state), description=table(found, state))


def latest_artifact(key: str) -> Any:
    """The id of the newest artifact with this key; None where the server has none."""
    wanted = ArtifactCollectionFilter(key=ArtifactCollectionFilterKey(any_=[key]))
    with get_client(sync_client=True) as client:
        found = client.read_latest_artifacts(artifact_filter=wanted)
    return found[0].latest_id if found else None


def keep_watching(active: bool) -> bool:
    """Switch the schedule of the deployment `watch_feedback`; False where the server has none."""
    with get_client(sync_client=True) as client:
        try:
            watch = client.read_deployment_by_name(f"{WATCH}/{WATCH}")
        except ObjectNotFound:
            return False
        for schedule in client.read_deployment_schedules(watch.id):
            if schedule.active != active:
                client.update_deployment_schedule(watch.id, schedule.id, active=active)
    return True


def skip_missed(deployment: UUID) -> int:
    """Delete runs of the deployment that fell due before now, of which one is enough. Returns how many."""
    wanted = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[deployment]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
        expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)),
    )
    with get_client(sync_client=True) as client:
        missed = client.read_flow_runs(flow_run_filter=wanted)
        for run in missed:
            client.delete_flow_run(run.id)
    return len(missed)


def rest(root: Path) -> bool:
    """Switch the schedule off, unless a collection was opened meanwhile; whether it is off."""
    keep_watching(False)
    if any_left(root):
        keep_watching(True)
        return False
    return True


def any_left(root: Path) -> bool:
    """Whether a collection is open, or ended and nobody was told."""
    with open_store(root) as store:
        return any(one.is_open or one.untold for one in list_collections(store))
