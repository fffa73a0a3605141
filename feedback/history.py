"""The store as it was at an event: the votes up to there, and which of them are new.

The log only grows and its numbers are never given twice, so a number says exactly what was known. A data set
that names its number can be made again, whatever has come since; only a person who was erased is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy import insert, select

from feedback.collection import Collection
from feedback.gathering import gather
from feedback.projects import list_projects
from feedback.records import EventType
from feedback.store import Store, as_event
from feedback.tables import events
from feedback.views import apply

VOTED = (EventType.VOTE_CAST, EventType.ITEM_ADJUDICATED)


@dataclass(frozen=True)
class Votes:
    """What people had said up to event `number` (0: nothing), which was logged at `at`."""

    store: str  # which log: another database has other numbers
    number: int
    at: datetime | None
    collections: tuple[Collection, ...]  # with what counts alone, by project
    new: frozenset[str]  # ids of the votes that count and came after event `since`
    new_items: frozenset[str]  # items that were voted on or decided after it
    since: int

    @property
    def num_votes(self) -> int:
        return sum(len(collection.votes) for collection in self.collections)


def store_id(store: Store) -> str:
    """A name for this log: a hash of when it began. Empty for a log without entries."""
    with store.read() as connection:
        first = connection.execute(
            select(events.c.number, events.c.at).order_by(events.c.number).limit(1)
        ).one_or_none()
    return "" if first is None else hashlib.sha256(f"{first.number} {first.at}".encode()).hexdigest()[:16]


def last_event(store: Store) -> int:
    """The number of the newest entry; 0 when there is none."""
    with store.read() as connection:
        number = connection.scalar(select(events.c.number).order_by(events.c.number.desc()).limit(1))
    return int(number or 0)


@contextlib.contextmanager
def as_of(store: Store, number: int) -> Iterator[Store]:
    """For the block, a store that holds the entries of `store` up to `number` and nothing else."""
    with tempfile.TemporaryDirectory() as directory:
        then = Store(Path(directory) / "then.db", clock=store.clock)
        try:
            with store.read() as connection:
                rows = connection.execute(
                    select(events).where(events.c.number <= number).order_by(events.c.number)
                ).all()
            with then.write() as connection:
                for row in rows:
                    connection.execute(insert(events).values(**row._mapping))
                    apply(connection, as_event(row))
            yield then
        finally:
            then.close()


def votes_at(store: Store, number: int, since: int) -> Votes:
    """Everything that counts up to event `number`; new is what came after event `since`."""
    with as_of(store, number) as then:
        log = then.events()
        collections = tuple(
            found
            for project in list_projects(then)
            if (found := gather(then, project.id).counted()).votes or found.decisions
        )
    later = [event for event in log if event.number > since and event.type in VOTED and event.payload]
    cast = {event.payload["vote"]["id"] for event in later if event.payload.get("vote")}
    standing = {vote.id: vote.item for collection in collections for vote in collection.votes}
    new = frozenset(cast & standing.keys())
    decided = {event.payload["item"] for event in later if event.payload.get("item")}
    return Votes(
        store=store_id(store),
        number=number,
        at=log[-1].at if log else None,
        collections=collections,
        new=new,
        new_items=frozenset({standing[vote] for vote in new} | decided),
        since=since,
    )
