"""Who is shown what next, and what comes of it: leases, votes, skips, flags, undo.

An item waits for `needed` votes: one, or the project's `overlap_votes` for its overlapping share. A lease
keeps an item for one annotator until it expires; then others may get it, and the vote of whoever held it
still counts.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from sqlalchemy import Connection, Row, and_, exists, func, or_, select
from sqlalchemy.sql.elements import ColumnElement

from feedback.errors import ConflictError, InputError, KeyUsedError, NotAllowedError
from feedback.projects import get_item, get_project
from feedback.records import (
    Annotator,
    EventType,
    Item,
    Project,
    Record,
    TaskKind,
    Vote,
    check_value,
)
from feedback.store import Store
from feedback.tables import adjudications, chat_turns, flags, items, leases, skips, votes

GIVEN_BACK = {  # where it is kept, and which of it stands
    EventType.ITEM_SKIPPED: (skips, skips.c.number > 0),
    EventType.ITEM_FLAGGED: (flags, flags.c.cleared.is_(False)),
}


@dataclass(frozen=True)
class Turn:
    """One exchange of a blind chat; `replies` are by response."""

    user: str
    replies: tuple[str, ...]


@dataclass(frozen=True)
class Shown:
    """An item in an annotator's hands."""

    project: Project
    item: Item
    sides: tuple[int, ...]  # sides[position] = response
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Progress:
    done: int  # this annotator's votes
    left: int  # items that this annotator may still get
    last_act: int | None  # the event of the last vote, skip or flag that stands, which `undo` takes back


def next_item(store: Store, annotator: Annotator, project_id: str) -> Shown | None:
    """The item that the annotator holds, or a new one under a lease; None when nothing is left."""
    with store.write() as connection:
        project = get_project(connection, project_id)
        held = _held(connection, store, annotator, project)
        found = held or _draw(connection, store, annotator, project)
        if found is None:
            return None
        item = get_item(connection, found)
        lease = _lease(connection, item.id, annotator)
        if lease is None or lease.expires <= store.now():
            sides = tuple(lease.sides) if lease else draw_sides(project, item, annotator)
            _take(connection, store, annotator, item, sides)
        else:
            sides = tuple(lease.sides)
        return Shown(project, item, sides, conversation(connection, item.id, annotator.id))


def cast_vote(
    store: Store, annotator: Annotator, item_id: str, key: str, value: Record, seconds: float
) -> Vote:
    """Keep a vote; when this returns, it is on the disk. The same `key` again gives the vote that it made.

    Raises NotAllowedError for an item that was not given to this annotator, ConflictError when the key or the
    item has another vote already, InputError for a value that does not answer the item.
    """
    with store.write() as connection:
        item = get_item(connection, item_id)
        earlier = connection.execute(select(votes).where(votes.c.id == key)).one_or_none()
        if earlier is not None:
            return _same(earlier, annotator, item_id, value)
        lease = _must_hold(connection, item_id, annotator)
        project = get_project(connection, item.project)
        try:
            check_value(value, item.kind, len(item.responses), project)
        except ValueError as error:
            raise InputError(str(error)) from None
        if item.kind is TaskKind.CHAT and not conversation(connection, item_id, annotator.id):
            raise InputError("talk to the two before you vote")
        at = store.clock()
        vote = Vote.model_validate(
            {
                "id": key,
                "project": item.project,
                "item": item.id,
                "annotator": annotator.id,
                "kind": item.kind,
                "value": value,
                "seconds": min(max(seconds, 0.0), _seconds_since(lease.taken, store.now())),
                "sides": lease.sides,
                "at": at,
            }
        )
        payload = {"vote": vote.model_dump(mode="json"), "annotator": annotator.id}
        store.append(connection, annotator.id, EventType.VOTE_CAST, payload)
    return vote


def skip_item(store: Store, annotator: Annotator, item_id: str, reason: str) -> None:
    """Give an item back, with a reason; it does not come again to this annotator."""
    _give_back(store, annotator, item_id, reason, EventType.ITEM_SKIPPED)


def flag_item(store: Store, annotator: Annotator, item_id: str, reason: str) -> None:
    """Say that an item is not fit to be voted on; nobody gets it until a manager has looked."""
    _give_back(store, annotator, item_id, reason, EventType.ITEM_FLAGGED)


def clear_flag(store: Store, actor: str, item_id: str) -> None:
    """Let a flagged item come back to the queue."""
    with store.write() as connection:
        get_item(connection, item_id)
        store.append(connection, actor, EventType.FLAG_CLEARED, {"item": item_id})


def undo(store: Store, annotator: Annotator, project_id: str, act: int | None = None) -> str | None:
    """Take the annotator's last vote, skip or flag back, and give that item again, on the same sides.

    `act` is the event that is meant: sent twice, it is taken back once, and nothing older with it. Returns
    the item, None when `act` was taken back before. Raises ConflictError when there is nothing, when
    something newer stands, or when it was adjudicated since.
    """
    with store.write() as connection:
        kind, row = _last_act(connection, annotator, project_id)
        if act is not None and row is not None and row.number > act:
            raise ConflictError("you have done something else since; load the page again")
        if act is not None and (row is None or row.number < act):
            return None
        if row is None:
            raise ConflictError("there is nothing to undo")
        if connection.scalar(select(adjudications.c.item).where(adjudications.c.item == row.item).limit(1)):
            raise ConflictError("this item was decided by an adjudicator since; it cannot be undone")
        payload = {"item": row.item, "annotator": annotator.id}
        if kind is EventType.VOTE_UNDONE:
            payload["vote"] = row.id
        store.append(connection, annotator.id, kind, payload)
        sides = row.record["sides"] if kind is EventType.VOTE_UNDONE else row.sides
        _take(connection, store, annotator, get_item(connection, row.item), tuple(sides))
        return row.item


def add_turn(
    store: Store, annotator: Annotator, item_id: str, key: str, user: str, replies: tuple[str, ...]
) -> None:
    """Keep one exchange of a chat; the same `key` again changes nothing. Raises NotAllowedError."""
    with store.write() as connection:
        _must_hold(connection, item_id, annotator)
        same = and_(*_of(chat_turns, item_id, annotator), chat_turns.c.key == key)
        if connection.scalar(select(chat_turns.c.number).where(same)):
            return
        payload = {
            "item": item_id,
            "annotator": annotator.id,
            "key": key,
            "user": user,
            "replies": list(replies),
        }
        store.append(connection, annotator.id, EventType.CHAT_TURN, payload)


def held_item(store: Store, annotator: Annotator, item_id: str) -> Shown:
    """An item that the annotator holds. Raises NotAllowedError for any other."""
    with store.read() as connection:
        item = get_item(connection, item_id)
        lease = _must_hold(connection, item_id, annotator)
        project = get_project(connection, item.project)
        return Shown(project, item, tuple(lease.sides), conversation(connection, item_id, annotator.id))


def shown_for_vote(store: Store, annotator: Annotator, item_id: str, key: str) -> Shown:
    """As `held_item`, and also for an item on which this annotator's vote `key` was counted before."""
    with store.read() as connection:
        mine = select(votes.c.record).where(votes.c.id == key, *_of(votes, item_id, annotator))
        earlier = connection.scalar(mine)
        if earlier is not None:
            item = get_item(connection, item_id)
            return Shown(get_project(connection, item.project), item, tuple(earlier["sides"]))
    return held_item(store, annotator, item_id)


def progress(store: Store, annotator: Annotator, project_id: str) -> Progress:
    with store.read() as connection:
        mine = and_(*_mine(votes, annotator, project_id), votes.c.undone.is_(False))
        done = connection.scalar(select(func.count()).select_from(votes).where(mine)) or 0
        open_items = and_(*_open_to(store, annotator, project_id), items.c.is_gold.is_(False))
        left = connection.scalar(select(func.count()).select_from(items).where(open_items)) or 0
        last = _last_act(connection, annotator, project_id)[1]
        return Progress(done, left, None if last is None else last.number)


def draw_sides(project: Project, item: Item, annotator: Annotator) -> tuple[int, ...]:
    """An order of the responses, even over items and annotators, and always the same for one of each."""
    order = list(range(len(item.responses)))
    random.Random(f"{project.seed}/{item.id}/{annotator.id}").shuffle(order)
    return tuple(order)


def conversation(connection: Connection, item_id: str, annotator_id: str) -> tuple[Turn, ...]:
    query = (
        select(chat_turns.c.user, chat_turns.c.replies)
        .where(chat_turns.c.item == item_id, chat_turns.c.annotator == annotator_id)
        .order_by(chat_turns.c.number)
    )
    return tuple(Turn(row.user, tuple(row.replies)) for row in connection.execute(query))


def _held(connection: Connection, store: Store, annotator: Annotator, project: Project) -> str | None:
    """The item under the newest lease that runs, or that ran out while nobody else took the item."""
    query = (
        select(leases.c.item)
        .join(items, items.c.id == leases.c.item)
        .where(*_mine(leases, annotator, project.id), items.c.flagged.is_(False))
        .where(or_(leases.c.expires > store.now(), and_(*_open_to(store, annotator, project.id))))
        .order_by(leases.c.number.desc())
    )
    return connection.scalar(query.limit(1))


def _draw(connection: Connection, store: Store, annotator: Annotator, project: Project) -> str | None:
    open_items = and_(*_open_to(store, annotator, project.id))
    regular = select(items.c.id).where(open_items, items.c.is_gold.is_(False)).order_by(items.c.position)
    gold = select(items.c.id).where(open_items, items.c.is_gold.is_(True)).order_by(items.c.chance)
    if _is_turn_of_gold(connection, annotator, project):
        return connection.scalar(gold.limit(1)) or connection.scalar(regular.limit(1))
    return connection.scalar(regular.limit(1))


def _is_turn_of_gold(connection: Connection, annotator: Annotator, project: Project) -> bool:
    """By a draw that depends on how far the annotator is; always where a project is nothing but gold."""
    regular = select(items.c.id).where(items.c.project == project.id, items.c.is_gold.is_(False)).limit(1)
    if connection.scalar(regular) is None:
        return True
    done = sum(
        connection.scalar(select(func.count()).select_from(table).where(*_mine(table, annotator, project.id)))
        or 0
        for table in (votes, skips)
    )
    digest = hashlib.sha256(f"{project.seed}/{annotator.id}/{done}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48 < project.gold_share


def _open_to(store: Store, annotator: Annotator, project_id: str) -> list[ColumnElement[bool]]:
    """Items that wait for a vote this annotator may give, the leases of others counted."""
    theirs = (
        select(func.count())
        .select_from(leases)
        .where(
            leases.c.item == items.c.id,
            leases.c.annotator != annotator.id,
            leases.c.expires > store.now(),
        )
        .correlate(items)
        .scalar_subquery()
    )
    voted = exists().where(*_of(votes, items.c.id, annotator), votes.c.undone.is_(False))
    skipped = exists().where(*_of(skips, items.c.id, annotator))
    decided = exists().where(adjudications.c.item == items.c.id)
    return [
        items.c.project == project_id,
        items.c.flagged.is_(False),
        or_(
            items.c.is_gold.is_(True),
            and_(items.c.votes < items.c.needed, items.c.votes + theirs < items.c.needed),
        ),
        ~voted,
        ~skipped,
        ~decided,
    ]


def _mine(table, annotator: Annotator, project_id: str) -> list[ColumnElement[bool]]:
    return [table.c.annotator == annotator.id, table.c.project == project_id]


def _of(table, item_id, annotator: Annotator) -> list[ColumnElement[bool]]:
    return [table.c.item == item_id, table.c.annotator == annotator.id]


def _lease(connection: Connection, item_id: str, annotator: Annotator) -> Row | None:
    return connection.execute(select(leases).where(*_of(leases, item_id, annotator))).one_or_none()


def _must_hold(connection: Connection, item_id: str, annotator: Annotator) -> Row:
    lease = _lease(connection, item_id, annotator)
    if lease is None:
        voted = and_(*_of(votes, item_id, annotator), votes.c.undone.is_(False))
        if connection.scalar(select(votes.c.id).where(voted)):
            raise ConflictError("you have voted on this item already; undo that vote to change it")
        raise NotAllowedError("this item was not given to you")
    return lease


def _take(
    connection: Connection, store: Store, annotator: Annotator, item: Item, sides: tuple[int, ...]
) -> None:
    project = get_project(connection, item.project)
    payload = {
        "item": item.id,
        "annotator": annotator.id,
        "project": item.project,
        "sides": list(sides),
        "expires": store.later(project.lease_seconds),
    }
    store.append(connection, annotator.id, EventType.ITEM_LEASED, payload)


def _give_back(store: Store, annotator: Annotator, item_id: str, reason: str, kind: EventType) -> None:
    reason = reason.strip()
    if not reason or len(reason) > 1000:
        raise InputError(f"a reason of 1 to 1000 characters is needed, found {len(reason)}")
    with store.write() as connection:
        item = get_item(connection, item_id)
        table, standing = GIVEN_BACK[kind]
        same = and_(*_of(table, item_id, annotator), standing, table.c.reason == reason)
        if connection.scalar(select(table.c.number).where(same)):
            return  # sent twice
        lease = _must_hold(connection, item_id, annotator)
        payload = {"item": item_id, "annotator": annotator.id, "project": item.project, "reason": reason}
        payload["sides"] = lease.sides
        store.append(connection, annotator.id, kind, payload)


def _same(earlier: Row, annotator: Annotator, item_id: str, value: Record) -> Vote:
    if earlier.annotator != annotator.id:
        raise NotAllowedError("this key belongs to another annotator's vote")
    vote = Vote.model_validate(earlier.record)
    if earlier.undone:
        raise KeyUsedError("this vote was taken back before; send it once more if you mean it")
    if vote.item != item_id or vote.value != value:
        raise ConflictError("this vote was counted before, with another answer; undo it to change it")
    return vote


def _last_act(connection: Connection, annotator: Annotator, project_id: str) -> tuple[EventType, Row | None]:
    kinds = {
        EventType.VOTE_UNDONE: (votes, votes.c.undone.is_(False)),
        EventType.SKIP_UNDONE: GIVEN_BACK[EventType.ITEM_SKIPPED],
        EventType.FLAG_CLEARED: GIVEN_BACK[EventType.ITEM_FLAGGED],
    }
    last: tuple[EventType, Row | None] = (EventType.VOTE_UNDONE, None)
    for kind, (table, standing) in kinds.items():
        query = select(table).where(*_mine(table, annotator, project_id), standing)
        row = connection.execute(query.order_by(table.c.number.desc()).limit(1)).one_or_none()
        if row is not None and (last[1] is None or row.number > last[1].number):
            last = (kind, row)
    return last


def _seconds_since(then: str, now: str) -> float:
    from datetime import datetime

    return max(0.0, (datetime.fromisoformat(now) - datetime.fromisoformat(then)).total_seconds())
