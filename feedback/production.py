"""Answers from real use, and what their users say of them: the projects `production` and its comments.

An answer becomes an item of `production` only when its user consented; a thumb up or down is a vote of kind
label on it, a comment a critique in a project of its own, since an item takes one kind of vote. Users are
pseudonyms: a keyed hash of the name that the client gives. Nothing here links an item to its user before the
user votes.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, and_, select

from feedback.errors import ConflictError, InputError
from feedback.projects import get_project
from feedback.records import Critique, EventType, Item, Label, Project, Record, Role, TaskKind, Vote
from feedback.store import SYSTEM, Store
from feedback.tables import adjudications, annotators, items, projects, votes

PRODUCTION = "production"
COMMENTS = "production-comments"
GUIDELINES = "Answers that users got, each with their thumb up or down. Good: the user was helped."
PROJECTS = {
    PRODUCTION: Project(
        id=PRODUCTION, name="Real use", kind=TaskKind.LABEL, guidelines=GUIDELINES, gold_share=0.0
    ),
    COMMENTS: Project(
        id=COMMENTS,
        name="Comments from real use",
        kind=TaskKind.CRITIQUE,
        guidelines=GUIDELINES,
        gold_share=0.0,
    ),
}


class UnknownAnswerError(InputError):
    """No answer with this id was kept."""


@dataclass(frozen=True)
class Rated:
    """What became of a rating."""

    vote: str
    replaced: bool  # an earlier one of the same user on the same answer


def open_production(store: Store) -> None:
    """Make the two projects where they are absent. Raises InputError where one is of another kind."""
    with store.write() as connection:
        for wanted in PROJECTS.values():
            if connection.scalar(select(projects.c.id).where(projects.c.id == wanted.id)) is None:
                payload = {"project": wanted.model_dump(mode="json")}
                store.append(connection, SYSTEM, EventType.PROJECT_CREATED, payload)
                continue
            found = get_project(connection, wanted.id)
            if found.kind is not wanted.kind:
                raise InputError(
                    f"project {wanted.id!r} is of kind {found.kind}; feedback from real use needs a project "
                    f"of this name and kind {wanted.kind}"
                )


def answer_item(
    answer_id: str,
    messages: Sequence[dict[str, str]],
    text: str,
    *,
    policy: str,
    decoding: dict[str, Any],
) -> Item:
    """An answer as an item of `production`. Raises pydantic's ValidationError where it can be none."""
    return Item.model_validate(
        {
            "id": answer_id,
            "project": PRODUCTION,
            "kind": TaskKind.LABEL,
            "messages": [{key: _clean(value) for key, value in message.items()} for message in messages],
            "responses": [{"text": _clean(text), "policy": policy, "decoding": decoding}],
        }
    )


def keep_answers(store: Store, answers: Sequence[Item]) -> None:
    """Add answers, all or none; on the disk when this returns. Raises StoreUnavailableError."""
    with store.write() as connection:
        for item in answers:
            store.append(connection, SYSTEM, EventType.ITEM_ADDED, {"item": item.model_dump(mode="json")})


def rate(store: Store, answer_id: str, user: str, *, good: bool, comment: str = "") -> Rated:
    """Keep what the pseudonym `user` says of an answer, in place of what it said before.

    The same rating again changes nothing. Raises UnknownAnswerError, and ConflictError when an adjudicator
    has decided the answer since.
    """
    with store.write() as connection:
        item = _answer(connection, answer_id)
        _know(store, connection, user)
        rated = _vote(store, connection, item, user, Label(good=good))
        if comment.strip():
            about = _comment_item(store, connection, item)
            _vote(store, connection, about, user, Critique(text=_clean(comment)))
    return rated


def _answer(connection: Connection, answer_id: str) -> Item:
    """Items of other projects are none of the users' business."""
    mine = and_(items.c.id == answer_id, items.c.project == PRODUCTION)
    record = connection.scalar(select(items.c.record).where(mine))
    if record is None:
        raise UnknownAnswerError(f"no answer with the id {answer_id[:200]!r} was kept")
    return Item.model_validate(record)


def _know(store: Store, connection: Connection, user: str) -> None:
    """An account without a secret, so that nobody can sign in as a user."""
    if connection.scalar(select(annotators.c.id).where(annotators.c.id == user)) is None:
        payload = {"annotator": user, "name": user, "role": str(Role.ANNOTATOR)}
        store.append(connection, SYSTEM, EventType.ANNOTATOR_ADDED, payload)


def _vote(store: Store, connection: Connection, item: Item, user: str, value: Record) -> Rated:
    mine = and_(votes.c.item == item.id, votes.c.annotator == user, votes.c.undone.is_(False))
    before = connection.scalar(select(votes.c.record).where(mine))
    if before is not None:
        earlier = Vote.model_validate(before)
        if earlier.value == value:
            return Rated(earlier.id, replaced=False)
        _undo(store, connection, earlier)
    vote = Vote.model_validate(
        {
            "id": secrets.token_hex(16),
            "project": item.project,
            "item": item.id,
            "annotator": user,
            "kind": item.kind,
            "value": value,
            "seconds": 0.0,  # nobody measured how long the user read
            "sides": (0,),
            "at": store.clock(),
        }
    )
    payload = {"vote": vote.model_dump(mode="json"), "annotator": user}
    store.append(connection, user, EventType.VOTE_CAST, payload)
    return Rated(vote.id, replaced=before is not None)


def _undo(store: Store, connection: Connection, vote: Vote) -> None:
    decided = select(adjudications.c.item).where(adjudications.c.item == vote.item).limit(1)
    if connection.scalar(decided):
        raise ConflictError("this answer was decided by an adjudicator since; the rating stays as it is")
    payload = {"item": vote.item, "annotator": vote.annotator, "vote": vote.id}
    store.append(connection, vote.annotator, EventType.VOTE_UNDONE, payload)


def _comment_item(store: Store, connection: Connection, item: Item) -> Item:
    """The same answer among the comments, put there with the first one."""
    about = item.model_copy(
        update={"id": f"{item.id}.comments", "project": COMMENTS, "kind": TaskKind.CRITIQUE}
    )
    if connection.scalar(select(items.c.id).where(items.c.id == about.id)) is None:
        store.append(connection, SYSTEM, EventType.ITEM_ADDED, {"item": about.model_dump(mode="json")})
    return about


def pseudonym_of(user: str, key: bytes) -> str:
    """The annotator that a user is here; without the key nobody finds the one from the other."""
    return f"user-{hmac.new(key, f'user:{user}'.encode(), hashlib.sha256).hexdigest()[:24]}"


def read_key(path: Path) -> bytes:
    """The key of the pseudonyms; made on first use, and readable by its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    if not path.exists():
        with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(made, path)  # whole, and never in place of another process's key
        except FileExistsError:
            pass
        finally:
            made.unlink()
    key = path.read_text().strip().encode()
    if len(key) < 32:
        raise InputError(f"{path}: holds no key of 32 characters or more; a new one makes new pseudonyms")
    return key


def _clean(text: str) -> str:
    return text.replace("\x00", "")  # which PostgreSQL's texts cannot hold
