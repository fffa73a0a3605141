"""From the store to records: what agreement, consensus, formats and the dashboard work on."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select

from feedback.accounts import list_annotators
from feedback.collection import Collection, Decision, collect
from feedback.projects import get_project
from feedback.records import EventType, Item, Record, Vote, check_value
from feedback.store import Store
from feedback.tables import adjudications, flags, items, leases, skips, votes


@dataclass(frozen=True)
class QueueState:
    """How far a project is; gold items are counted apart."""

    num_items: int
    num_gold: int
    num_complete: int  # items with all the votes they need
    num_flagged: int
    votes_needed: int
    votes_given: int  # that count towards what is needed
    num_leased: int  # in somebody's hands now


@dataclass(frozen=True)
class Remark:
    """Why somebody did not vote on an item."""

    item: str
    annotator: str
    reason: str


def gather(store: Store, project_id: str) -> Collection:
    """Everything of one project, without votes that were undone. Raises InputError for an unknown project."""
    people = list_annotators(store)
    with store.read() as connection:
        project = get_project(connection, project_id)
        here = items.c.project == project_id
        rows = [Item.model_validate(r) for r in connection.scalars(select(items.c.record).where(here))]
        standing = select(votes.c.record).where(votes.c.project == project_id, votes.c.undone.is_(False))
        cast = [Vote.model_validate(record) for record in connection.scalars(standing)]
        decided = [
            Decision(
                item=row.item, annotator=row.adjudicator, value=row.value, at=datetime.fromisoformat(row.at)
            )
            for row in connection.execute(
                select(adjudications)
                .where(adjudications.c.project == project_id)
                .order_by(adjudications.c.number)
            )
        ]
    return collect(project, rows, cast, people, decided)


def queue_state(store: Store, project_id: str) -> QueueState:
    regular = [items.c.project == project_id, items.c.is_gold.is_(False)]
    with store.read() as connection:

        def count(*conditions) -> int:
            return connection.scalar(select(func.count()).select_from(items).where(*conditions)) or 0

        given = func.coalesce(func.sum(func.least(items.c.votes, items.c.needed)), 0)
        if connection.dialect.name == "sqlite":
            given = func.coalesce(func.sum(func.min(items.c.votes, items.c.needed)), 0)
        needed = func.coalesce(func.sum(items.c.needed), 0)
        sums = connection.execute(select(needed, given).where(*regular)).one()
        running = [leases.c.project == project_id, leases.c.expires > store.now()]
        return QueueState(
            num_items=count(*regular),
            num_gold=count(items.c.project == project_id, items.c.is_gold.is_(True)),
            num_complete=count(*regular, items.c.votes >= items.c.needed),
            num_flagged=count(items.c.project == project_id, items.c.flagged.is_(True)),
            votes_needed=int(sums[0]),
            votes_given=int(sums[1]),
            num_leased=connection.scalar(select(func.count()).select_from(leases).where(*running)) or 0,
        )


def remarks(store: Store, project_id: str) -> tuple[list[Remark], list[Remark]]:
    """Flags that wait for a manager, and skips, the newest first."""
    with store.read() as connection:
        waiting = select(flags).where(flags.c.project == project_id, flags.c.cleared.is_(False))
        given = select(skips).where(skips.c.project == project_id)
        found = [
            [
                Remark(row.item, row.annotator, row.reason)
                for row in connection.execute(query.order_by(number.desc()).limit(100))
            ]
            for query, number in ((waiting, flags.c.number), (given, skips.c.number))
        ]
    return found[0], found[1]


def adjudicate(store: Store, adjudicator: str, project_id: str, item: Item, value: Record) -> None:
    """Decide an item; a later decision replaces an earlier one. Raises ValueError when it does not fit."""
    with store.write() as connection:
        check_value(value, item.kind, len(item.responses), get_project(connection, project_id))
        payload = {
            "item": item.id,
            "project": project_id,
            "annotator": adjudicator,
            "value": value.model_dump(mode="json"),
        }
        store.append(connection, adjudicator, EventType.ITEM_ADJUDICATED, payload)
