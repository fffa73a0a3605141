"""What each event does to the views. The only code that writes them, live and when they are rebuilt."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

from sqlalchemy import Connection, delete, exists, func, insert, select, update

from feedback.records import Event, EventType, Project
from feedback.tables import (
    adjudications,
    annotators,
    chat_turns,
    flags,
    items,
    leases,
    projects,
    skips,
    votes,
)

ERASED = {"erased": True}


def apply(connection: Connection, event: Event) -> None:
    """Bring the views up to `event`. Events of erased persons, and those of the audit log, change nothing."""
    handler = HANDLERS.get(event.type)
    if handler is not None and event.payload != ERASED:
        handler(connection, event)


def chance(project: Project, item: str) -> float:
    """A number from 0 to 1 that depends on the project's seed and the item alone."""
    digest = hashlib.sha256(f"{project.seed}/{item}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def recount(connection: Connection, *conditions) -> None:
    """Count the votes of the items under `conditions` again: those not undone, by people not excluded."""
    counted = (
        select(func.count())
        .select_from(votes.join(annotators, votes.c.annotator == annotators.c.id))
        .where(votes.c.item == items.c.id, votes.c.undone.is_(False), annotators.c.excluded.is_(False))
        .scalar_subquery()
    )
    connection.execute(update(items).where(*conditions).values(votes=counted))


def refresh_flags(connection: Connection, *conditions) -> None:
    open_flag = exists().where(flags.c.item == items.c.id, flags.c.cleared.is_(False))
    connection.execute(update(items).where(*conditions).values(flagged=open_flag))


def remove_person(connection: Connection, person: str) -> None:
    """Take one person's rows out of every view."""
    voted = connection.scalars(select(votes.c.item).where(votes.c.annotator == person)).all()
    flagged = connection.scalars(select(flags.c.item).where(flags.c.annotator == person)).all()
    for table in (votes, leases, skips, flags, chat_turns):
        connection.execute(delete(table).where(table.c.annotator == person))
    connection.execute(delete(adjudications).where(adjudications.c.adjudicator == person))
    connection.execute(delete(annotators).where(annotators.c.id == person))
    for item in voted:
        recount(connection, items.c.id == item)
    for item in flagged:
        refresh_flags(connection, items.c.id == item)


def _project_created(connection: Connection, event: Event) -> None:
    record = event.payload["project"]
    connection.execute(insert(projects).values(id=record["id"], record=record, created=event.number))


def _project_changed(connection: Connection, event: Event) -> None:
    record = event.payload["project"]
    connection.execute(update(projects).where(projects.c.id == record["id"]).values(record=record))


def _item_added(connection: Connection, event: Event) -> None:
    record = event.payload["item"]
    found = connection.execute(
        select(projects.c.record).where(projects.c.id == record["project"])
    ).scalar_one()
    project = Project.model_validate(found)
    drawn = chance(project, record["id"])
    is_gold = record.get("gold") is not None
    overlaps = drawn < project.overlap_share
    connection.execute(
        insert(items).values(
            id=record["id"],
            project=record["project"],
            record=record,
            position=event.number,
            chance=drawn,
            is_gold=is_gold,
            needed=0 if is_gold else project.overlap_votes if overlaps else 1,
        )
    )


def _annotator_added(connection: Connection, event: Event) -> None:
    person = event.payload
    connection.execute(
        insert(annotators).values(
            id=person["annotator"], name=person["name"], role=person["role"], active=True, excluded=False
        )
    )


def _annotator_changed(connection: Connection, event: Event) -> None:
    person = event.payload["annotator"]
    changes = {name: event.payload[name] for name in ("role", "active", "excluded") if name in event.payload}
    connection.execute(update(annotators).where(annotators.c.id == person).values(**changes))
    if "excluded" in changes:
        recount(connection, items.c.id.in_(select(votes.c.item).where(votes.c.annotator == person)))


def _item_leased(connection: Connection, event: Event) -> None:
    lease = event.payload
    _release(connection, event)
    connection.execute(
        insert(leases).values(
            item=lease["item"],
            annotator=lease["annotator"],
            project=lease["project"],
            sides=lease["sides"],
            taken=event.at.isoformat(timespec="microseconds"),
            expires=lease["expires"],
            number=event.number,
        )
    )


def _release(connection: Connection, event: Event) -> None:
    payload = event.payload
    connection.execute(
        delete(leases).where(leases.c.item == payload["item"], leases.c.annotator == payload["annotator"])
    )


def _vote_cast(connection: Connection, event: Event) -> None:
    record = event.payload["vote"]
    connection.execute(
        insert(votes).values(
            id=record["id"],
            project=record["project"],
            item=record["item"],
            annotator=record["annotator"],
            record=record,
            number=event.number,
        )
    )
    connection.execute(
        delete(leases).where(leases.c.item == record["item"], leases.c.annotator == record["annotator"])
    )
    recount(connection, items.c.id == record["item"])


def _vote_undone(connection: Connection, event: Event) -> None:
    connection.execute(update(votes).where(votes.c.id == event.payload["vote"]).values(undone=True))
    recount(connection, items.c.id == event.payload["item"])


def _item_skipped(connection: Connection, event: Event) -> None:
    names = ("item", "annotator", "project", "reason", "sides")
    _release(connection, event)
    connection.execute(
        insert(skips).values(number=event.number, **{name: event.payload[name] for name in names})
    )


def _skip_undone(connection: Connection, event: Event) -> None:
    payload = event.payload
    connection.execute(
        delete(skips).where(skips.c.item == payload["item"], skips.c.annotator == payload["annotator"])
    )


def _item_flagged(connection: Connection, event: Event) -> None:
    names = ("item", "annotator", "project", "reason", "sides")
    _release(connection, event)
    connection.execute(
        insert(flags).values(number=event.number, **{name: event.payload[name] for name in names})
    )
    refresh_flags(connection, items.c.id == event.payload["item"])


def _flag_cleared(connection: Connection, event: Event) -> None:
    """All flags of the item, or those of the annotator who takes a flag back."""
    cleared = [flags.c.item == event.payload["item"]]
    if "annotator" in event.payload:
        cleared.append(flags.c.annotator == event.payload["annotator"])
    connection.execute(update(flags).where(*cleared).values(cleared=True))
    refresh_flags(connection, items.c.id == event.payload["item"])


def _chat_turn(connection: Connection, event: Event) -> None:
    names = ("item", "annotator", "key", "user", "replies")
    connection.execute(
        insert(chat_turns).values(number=event.number, **{name: event.payload[name] for name in names})
    )


def _item_adjudicated(connection: Connection, event: Event) -> None:
    payload = event.payload
    connection.execute(
        insert(adjudications).values(
            number=event.number,
            item=payload["item"],
            project=payload["project"],
            adjudicator=payload["annotator"],
            value=payload["value"],
            at=event.at.isoformat(timespec="microseconds"),
        )
    )


HANDLERS: Mapping[EventType, Callable[[Connection, Event], None]] = {
    EventType.PROJECT_CREATED: _project_created,
    EventType.PROJECT_CHANGED: _project_changed,
    EventType.ITEM_ADDED: _item_added,
    EventType.ANNOTATOR_ADDED: _annotator_added,
    EventType.ANNOTATOR_CHANGED: _annotator_changed,
    EventType.ITEM_LEASED: _item_leased,
    EventType.LEASE_RELEASED: _release,
    EventType.VOTE_CAST: _vote_cast,
    EventType.VOTE_UNDONE: _vote_undone,
    EventType.ITEM_SKIPPED: _item_skipped,
    EventType.SKIP_UNDONE: _skip_undone,
    EventType.ITEM_FLAGGED: _item_flagged,
    EventType.FLAG_CLEARED: _flag_cleared,
    EventType.CHAT_TURN: _chat_turn,
    EventType.ITEM_ADJUDICATED: _item_adjudicated,
}
