"""Collections: a project whose votes are waited for, until there are enough or a deadline has passed.

What becomes of one are entries of the log that change no view: opened, ended, claimed, announced. Writers
take turns, so of several that look at once one ends a collection and one tells of it; and nothing of this is
in a process, so waiting holds none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, case, exists, func, select

from feedback.errors import ConflictError, InputError
from feedback.projects import append_items, get_project
from feedback.records import Event, EventType, Item, Project
from feedback.store import SYSTEM, Store, as_event, time_text
from feedback.tables import adjudications, events, items, projects, votes

VOTES, DEADLINE, CLOSED = "votes", "deadline", "closed"  # why a collection ended
CLAIM_SECONDS = 180.0  # a watcher that has said nothing for so long is gone
PACE = timedelta(hours=24)  # the votes of so long say how fast it goes
ENTRIES = (
    EventType.COLLECTION_OPENED,
    EventType.COLLECTION_ENDED,
    EventType.COLLECTION_CLAIMED,
    EventType.COLLECTION_ANNOUNCED,
)


@dataclass(frozen=True)
class Watched:
    """One collection, as the log says."""

    id: str  # of its project
    opened: datetime
    wanted: int  # votes that end it
    deadline: datetime | None
    about: dict[str, Any] = field(default_factory=dict)  # what it was made of, for those who made it
    ended: datetime | None = None
    reason: str = ""
    votes: int = 0  # at its end
    claimed: datetime | None = None
    announced: bool = False

    @property
    def is_open(self) -> bool:
        return self.ended is None

    @property
    def untold(self) -> bool:
        """Whether it ended by itself and nobody was told."""
        return self.reason in (VOTES, DEADLINE) and not self.announced


@dataclass(frozen=True)
class Progress:
    """How far a collection is, at one moment."""

    now: datetime
    votes: int  # that count towards what is wanted
    by_annotator: dict[str, int]  # votes that stand, gold items left out
    recent: int  # of them, those within `PACE`


def open_collection(
    store: Store,
    project: Project,
    rows: Iterable[Item],
    *,
    votes_wanted: int = 0,
    deadline_hours: float = 0.0,
    about: dict[str, Any] | None = None,
) -> bool:
    """Make the project with its items and begin to wait, all or nothing; False when that was done before.

    0 votes wanted are all that the items need, and more than those count as those; a deadline of 0 hours is
    none. Raises ConflictError for a project of this id that is no collection, InputError without an item that
    waits for votes.
    """
    with store.write() as connection:
        if project.id in _read(connection):
            return False
        if connection.scalar(select(projects.c.id).where(projects.c.id == project.id)) is not None:
            raise ConflictError(f"project {project.id!r} exists already, and is no collection")
        store.append(
            connection, SYSTEM, EventType.PROJECT_CREATED, {"project": project.model_dump(mode="json")}
        )
        if append_items(store, connection, SYSTEM, project, rows) == 0:
            raise InputError(f"collection {project.id!r}: no items")
        needed = _needed(connection, project.id)
        if needed == 0:
            raise InputError(f"collection {project.id!r}: all items are gold, so no votes are waited for")
        payload = {
            "project": project.id,
            "wanted": min(votes_wanted, needed) if votes_wanted else needed,
            "deadline": store.later(deadline_hours * 3600.0) if deadline_hours else "",
            "about": about or {},
        }
        store.append(connection, SYSTEM, EventType.COLLECTION_OPENED, payload)
        return True


def list_collections(store: Store) -> list[Watched]:
    """In the order in which they were opened."""
    with store.read() as connection:
        return list(_read(connection).values())


def find_collection(store: Store, project_id: str) -> Watched:
    """Raises InputError when there is none."""
    with store.read() as connection:
        return _find(connection, project_id)


def settle(store: Store, project_id: str) -> Watched:
    """End the collection if it is time; how it stands after that. Raises InputError when there is none.

    It is time when enough votes count, when nobody can be asked any more (the rest is flagged or decided) and
    there is a vote, or when the deadline has come.
    """
    with store.write() as connection:
        found = _find(connection, project_id)
        if not found.is_open:
            return found
        given = _given(connection, project_id)
        if given >= found.wanted or (given and not _anything_waits(connection, project_id)):
            return _end(store, connection, found, given, VOTES, SYSTEM)
        if found.deadline is not None and store.clock() >= found.deadline:
            return _end(store, connection, found, given, DEADLINE, SYSTEM)
        return found


def close_collection(store: Store, actor: str, project_id: str) -> Watched:
    """End it by hand, of which nobody is told; one that has ended stays as it is. Raises as `settle`."""
    with store.write() as connection:
        found = _find(connection, project_id)
        if not found.is_open:
            return found
        return _end(store, connection, found, _given(connection, project_id), CLOSED, actor)


def claim(store: Store, project_id: str) -> bool:
    """Take it on oneself to tell of the end; False when there is nothing to tell, or another watcher does.

    A claim holds for `CLAIM_SECONDS`: a watcher that died is followed by the next.
    """
    with store.write() as connection:
        found = _find(connection, project_id)
        now = store.clock()
        if not found.untold:
            return False
        if found.claimed is not None and now - found.claimed < timedelta(seconds=CLAIM_SECONDS):
            return False
        store.append(connection, SYSTEM, EventType.COLLECTION_CLAIMED, {"project": project_id})
        return True


def note_announced(store: Store, project_id: str) -> None:
    """Write down, once, that others know of the end."""
    with store.write() as connection:
        if _find(connection, project_id).untold:
            store.append(connection, SYSTEM, EventType.COLLECTION_ANNOUNCED, {"project": project_id})


def progress(store: Store, project_id: str) -> Progress:
    now = store.clock()
    with store.read() as connection:
        get_project(connection, project_id)
        rows = connection.execute(
            select(votes.c.annotator, events.c.at)
            .join(items, items.c.id == votes.c.item)
            .join(events, events.c.number == votes.c.number)
            .where(votes.c.project == project_id, votes.c.undone.is_(False), items.c.is_gold.is_(False))
        ).all()
        given = _given(connection, project_id)
    by_annotator: dict[str, int] = {}
    for row in rows:
        by_annotator[row.annotator] = by_annotator.get(row.annotator, 0) + 1
    since = time_text(now - PACE)
    return Progress(now, given, dict(sorted(by_annotator.items())), sum(row.at > since for row in rows))


def expected_end(found: Watched, state: Progress) -> datetime | None:
    """When the votes wanted will be there at the present pace; None while nobody votes.

        end = now + (wanted - votes) / pace,   pace = recent votes / min(24 hours, time since it was opened)

    The deadline is not looked at.
    """
    if state.recent == 0:
        return None
    window = min(PACE, state.now - found.opened)
    return state.now + (found.wanted - state.votes) * window / state.recent


def _read(connection: Connection) -> dict[str, Watched]:
    query = select(events).where(events.c.type.in_(map(str, ENTRIES))).order_by(events.c.number)
    found: dict[str, Watched] = {}
    for entry in map(as_event, connection.execute(query)):
        project = entry.payload["project"]
        found[project] = _after(found.get(project), entry)
    return found


def _after(before: Watched | None, entry: Event) -> Watched:
    """The collection after one entry more."""
    told = entry.payload
    if before is None:
        deadline = datetime.fromisoformat(told["deadline"]) if told["deadline"] else None
        return Watched(told["project"], entry.at, told["wanted"], deadline, told["about"])
    match entry.type:
        case EventType.COLLECTION_ENDED:
            return replace(before, ended=entry.at, reason=told["reason"], votes=told["votes"])
        case EventType.COLLECTION_CLAIMED:
            return replace(before, claimed=entry.at)
        case _:
            return replace(before, announced=True)


def _find(connection: Connection, project_id: str) -> Watched:
    try:
        return _read(connection)[project_id]
    except KeyError:
        raise InputError(f"there is no collection {project_id!r}") from None


def _end(
    store: Store, connection: Connection, found: Watched, given: int, reason: str, actor: str
) -> Watched:
    payload = {"project": found.id, "votes": given, "reason": reason}
    return _after(found, store.append(connection, actor, EventType.COLLECTION_ENDED, payload))


def _needed(connection: Connection, project_id: str) -> int:
    query = select(func.coalesce(func.sum(items.c.needed), 0)).where(*_regular(project_id))
    return int(connection.scalar(query) or 0)


def _given(connection: Connection, project_id: str) -> int:
    """Votes that count towards what is needed: no more on an item than it needs, none on gold items."""
    counted = case((items.c.votes < items.c.needed, items.c.votes), else_=items.c.needed)
    query = select(func.coalesce(func.sum(counted), 0)).where(*_regular(project_id))
    return int(connection.scalar(query) or 0)


def _anything_waits(connection: Connection, project_id: str) -> bool:
    decided = exists().where(adjudications.c.item == items.c.id)
    waiting = select(items.c.id).where(
        *_regular(project_id), items.c.votes < items.c.needed, items.c.flagged.is_(False), ~decided
    )
    return connection.scalar(waiting.limit(1)) is not None


def _regular(project_id: str) -> tuple[ColumnElement[bool], ...]:
    return items.c.project == project_id, items.c.is_gold.is_(False)
