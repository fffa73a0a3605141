"""People: accounts with a role and a secret, sign-in, sessions."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from functools import lru_cache

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import Connection, Row, delete, func, insert, select, update

from feedback.errors import ConflictError, InputError, StoreUnavailableError
from feedback.records import Annotator, EventType, Role
from feedback.store import Store
from feedback.tables import annotators, credentials, sessions

LEAST_SECRET = 10
MOST_SECRET = 1000
IDLE_SECONDS = 8 * 3600.0
SESSION_SECONDS = 7 * 24 * 3600.0

_hasher = PasswordHasher()


def add_annotator(
    store: Store, actor: str, name: str, role: Role = Role.ANNOTATOR, secret: str | None = None
) -> tuple[Annotator, str]:
    """Make an account. Returns it with its secret: the one given, or a random token, which is kept nowhere.

    Raises ConflictError for a name that is taken, InputError for a secret that is too short.
    """
    secret = new_token() if secret is None else secret
    _check_secret(secret)
    person = Annotator(id=secrets.token_hex(8), name=name.strip(), role=role)
    hashed = _hasher.hash(secret)
    with store.write() as connection:
        if _by_name(connection, person.name) is not None:
            raise ConflictError(f"the name {person.name!r} is taken")
        payload = {"annotator": person.id, "name": person.name, "role": str(person.role)}
        store.append(connection, actor, EventType.ANNOTATOR_ADDED, payload)
        connection.execute(insert(credentials).values(annotator=person.id, secret=hashed))
    return person, secret


def change_annotator(
    store: Store,
    actor: str,
    person_id: str,
    *,
    role: Role | None = None,
    active: bool | None = None,
    excluded: bool | None = None,
) -> Annotator:
    """Change what is given. Who is made inactive is signed out; an excluded person's votes count nowhere.

    Raises InputError for an unknown person, ConflictError when no manager would be left.
    """
    changes = {"role": None if role is None else str(role), "active": active, "excluded": excluded}
    payload = {name: value for name, value in changes.items() if value is not None}
    with store.write() as connection:
        before = get_annotator(connection, person_id)
        if role not in (None, Role.MANAGER) or active is False:
            _check_not_last(connection, before)
        store.append(connection, actor, EventType.ANNOTATOR_CHANGED, {"annotator": person_id} | payload)
        if active is False:
            connection.execute(delete(sessions).where(sessions.c.annotator == person_id))
        return get_annotator(connection, person_id)


def erase_account(store: Store, actor: str, person_id: str, reason: str) -> int:
    """Delete one person's data, see `Store.erase_person`. Returns how many entries of the log were emptied.

    Raises InputError for an unknown person, ConflictError when no manager would be left.
    """
    with store.write() as connection:
        _check_not_last(connection, get_annotator(connection, person_id))
        return store.erase_person(connection, actor, person_id, reason)


def new_secret(store: Store, person_id: str, secret: str | None = None) -> str:
    """Replace a person's secret and end all sessions. Returns the new one. Raises InputError."""
    secret = new_token() if secret is None else secret
    _check_secret(secret)
    hashed = _hasher.hash(secret)
    with store.write() as connection:
        get_annotator(connection, person_id)
        connection.execute(
            update(credentials).where(credentials.c.annotator == person_id).values(secret=hashed)
        )
        connection.execute(delete(sessions).where(sessions.c.annotator == person_id))
    return secret


def sign_in(store: Store, name: str, secret: str) -> tuple[Annotator, str] | None:
    """Begin a session. Returns the person and the session's token, or None; both ends are logged.

    A name that does not exist takes as long as a wrong secret.
    """
    with store.read() as connection:
        found = _by_name(connection, name.strip())
        stored = None
        if found is not None:
            stored = connection.scalar(
                select(credentials.c.secret).where(credentials.c.annotator == found.id)
            )
    matches = _verify(stored or _nobodys_hash(), secret) and stored is not None
    if found is None or not matches or not found.active:
        payload = {} if found is None else {"annotator": found.id}
        store.log(found.id if found else "nobody", EventType.SIGN_IN_FAILED, payload)
        return None
    token = new_token()
    with store.write() as connection:
        now = store.now()
        connection.execute(delete(sessions).where(sessions.c.started < store.later(-SESSION_SECONDS)))
        connection.execute(
            insert(sessions).values(token=_digest(token), annotator=found.id, started=now, seen=now)
        )
        store.append(connection, found.id, EventType.SIGNED_IN, {"annotator": found.id})
    return _as_annotator(found), token


def find_session(store: Store, token: str) -> Annotator | None:
    """Whose session this is; None when it is unknown, too old or was idle too long."""
    with store.read() as connection:
        query = (
            select(annotators, sessions.c.seen, sessions.c.started)
            .join(sessions, sessions.c.annotator == annotators.c.id)
            .where(sessions.c.token == _digest(token), annotators.c.active.is_(True))
        )
        row = connection.execute(query).one_or_none()
    if row is None or row.seen < store.later(-IDLE_SECONDS) or row.started < store.later(-SESSION_SECONDS):
        return None
    if row.seen < store.later(-60):  # one write a minute, not one a request
        # Where nothing can be written, who only reads need not know.
        with contextlib.suppress(StoreUnavailableError), store.write() as connection:
            connection.execute(
                update(sessions).where(sessions.c.token == _digest(token)).values(seen=store.now())
            )
    return _as_annotator(row)


def sign_out(store: Store, token: str, person: Annotator) -> None:
    with store.write() as connection:
        connection.execute(delete(sessions).where(sessions.c.token == _digest(token)))
        store.append(connection, person.id, EventType.SIGNED_OUT, {"annotator": person.id})


def list_annotators(store: Store) -> list[Annotator]:
    with store.read() as connection:
        return [
            _as_annotator(row) for row in connection.execute(select(annotators).order_by(annotators.c.name))
        ]


def get_annotator(connection: Connection, person_id: str) -> Annotator:
    """Raises InputError when there is none."""
    row = connection.execute(select(annotators).where(annotators.c.id == person_id)).one_or_none()
    if row is None:
        raise InputError(f"there is no annotator {person_id!r}")
    return _as_annotator(row)


def find_by_name(store: Store, name: str) -> Annotator | None:
    with store.read() as connection:
        row = _by_name(connection, name)
        return None if row is None else _as_annotator(row)


def count_managers(store: Store) -> int:
    """Active managers, who can sign in."""
    with store.read() as connection:
        return _managers(connection)


def new_token() -> str:
    return secrets.token_urlsafe(24)


def csrf_token(session_token: str) -> str:
    """What a form of this session must carry; it cannot be told without the session's cookie."""
    return _digest(f"csrf/{session_token}")


def _digest(token: str) -> str:
    """Session tokens have 192 random bits, so a plain hash keeps them."""
    return hashlib.sha256(token.encode()).hexdigest()


def _check_secret(secret: str) -> None:
    if not LEAST_SECRET <= len(secret) <= MOST_SECRET:
        raise InputError(f"a secret has {LEAST_SECRET} to {MOST_SECRET} characters, found {len(secret)}")


def _verify(hashed: str, secret: str) -> bool:
    try:
        return _hasher.verify(hashed, secret[:MOST_SECRET])
    except (VerificationError, InvalidHashError):
        return False


@lru_cache(maxsize=1)
def _nobodys_hash() -> str:
    return _hasher.hash(new_token())


def _by_name(connection: Connection, name: str) -> Row | None:
    return connection.execute(select(annotators).where(annotators.c.name == name)).one_or_none()


def _check_not_last(connection: Connection, person: Annotator) -> None:
    """Raises ConflictError when no manager would be left; holds for the transaction it is asked in."""
    if person.role is Role.MANAGER and person.active and _managers(connection) == 1:
        raise ConflictError("this is the only active manager; make another one first")


def _managers(connection: Connection) -> int:
    query = select(func.count()).select_from(annotators)
    found = connection.scalar(
        query.where(annotators.c.role == str(Role.MANAGER), annotators.c.active.is_(True))
    )
    return found or 0


def _as_annotator(row: Row) -> Annotator:
    return Annotator(id=row.id, name=row.name, role=Role(row.role), active=row.active, excluded=row.excluded)
