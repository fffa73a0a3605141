"""The store: an append-only log of events in a database, and the views that the log makes.

A write is one transaction: the event goes to the log and is applied to the views together, and writers take
turns, so what a writer read inside its transaction still holds when it commits. SQLite runs in WAL mode with
`synchronous=FULL`: what was acknowledged survives a killed process and a power cut.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Connection,
    Engine,
    create_engine,
    delete,
    event,
    insert,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError

from feedback.errors import InputError, StoreUnavailableError
from feedback.records import Event, EventType
from feedback.tables import VIEWS, credentials, events, sessions
from feedback.views import ERASED, apply, remove_person

BUSY_SECONDS = 10.0
WRITER_LOCK = 0x524C4846  # PostgreSQL's advisory lock, any number that others do not use
SYSTEM = "system"
ERASED_PERSON = "erased"


class Store:
    """One database. `clock` gives the time in UTC, for tests that pass it by."""

    def __init__(
        self,
        url: str | Path,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        busy_seconds: float = BUSY_SECONDS,
    ) -> None:
        """Open the database at `url`, an SQLAlchemy URL or a file of SQLite, and bring its tables up to date.

        Raises InputError for a URL that names no database, StoreUnavailableError when it cannot be opened.
        """
        self.clock = clock
        self.engine = _engine(url, busy_seconds)
        self._migrate()

    def _migrate(self) -> None:
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option(
            "script_location", str(Path(__file__).parent / "migrations").replace("%", "%%")
        )
        with self.write() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction beside which no other writer runs. Raises StoreUnavailableError: nothing changed."""
        with (
            _telling(),
            self.engine.connect().execution_options(writes=True) as connection,
            connection.begin(),
        ):
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": WRITER_LOCK})
            yield connection

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state. Raises StoreUnavailableError."""
        with _telling(), self.engine.connect() as connection, connection.begin():
            yield connection

    def now(self) -> str:
        return time_text(self.clock())

    def later(self, seconds: float) -> str:
        return time_text(self.clock() + timedelta(seconds=seconds))

    def append(self, connection: Connection, actor: str, kind: EventType, payload: dict[str, Any]) -> Event:
        """Add an entry to the log and apply it, inside the caller's transaction.

        A payload that holds data of a person names that person as `annotator`.
        """
        at = self.clock()
        subject = payload.get("annotator")
        row = {"at": time_text(at), "actor": actor, "subject": subject, "type": kind, "payload": payload}
        number = connection.execute(insert(events).values(**row).returning(events.c.number)).scalar_one()
        appended = Event(number=number, at=at, actor=actor, type=kind, payload=payload)
        apply(connection, appended)
        return appended

    def log(self, actor: str, kind: EventType, payload: dict[str, Any]) -> Event:
        """`append` in a transaction of its own."""
        with self.write() as connection:
            return self.append(connection, actor, kind, payload)

    def events(self, *, newest: int | None = None) -> list[Event]:
        """The log in its order, or its `newest` entries, the newest first."""
        query = select(events).order_by(events.c.number if newest is None else events.c.number.desc())
        with self.read() as connection:
            return [as_event(row) for row in connection.execute(query.limit(newest))]

    def rebuild(self) -> int:
        """Empty the views and make them again from the log, in one transaction. Returns how many events."""
        with self.write() as connection:
            for table in VIEWS:
                connection.execute(delete(table))
            log = [as_event(row) for row in connection.execute(select(events).order_by(events.c.number))]
            for entry in log:
                apply(connection, entry)
        return len(log)

    def views(self) -> dict[str, list[tuple]]:
        """Every row of every view, sorted: what a rebuild must give again."""
        with self.read() as connection:
            return {
                table.name: sorted((tuple(row) for row in connection.execute(select(table))), key=repr)
                for table in VIEWS
            }

    def erase_person(self, connection: Connection, actor: str, person: str, reason: str) -> int:
        """Delete one person's data in the caller's transaction: rows, secret, sessions, the log's entries.

        The entries stay with number, time and type and an empty payload, so that the log still tells how much
        happened and a rebuild gives the same views. Returns how many entries were emptied.
        """
        mine = events.c.subject == person
        redacted = connection.execute(
            update(events).where(mine).values(payload=ERASED, subject=ERASED_PERSON)
        ).rowcount
        connection.execute(update(events).where(events.c.actor == person).values(actor=ERASED_PERSON))
        remove_person(connection, person)
        for table in (credentials, sessions):
            connection.execute(delete(table).where(table.c.annotator == person))
        by = ERASED_PERSON if actor == person else actor
        self.append(connection, by, EventType.PERSON_ERASED, {"reason": reason, "entries": redacted})
        return redacted

    def close(self) -> None:
        self.engine.dispose()


def as_event(row: Any) -> Event:
    return Event(
        number=row.number,
        at=datetime.fromisoformat(row.at),
        actor=row.actor,
        type=row.type,
        payload=row.payload,
    )


def time_text(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="microseconds")


def _engine(url: str | Path, busy_seconds: float) -> Engine:
    if isinstance(url, Path) or "://" not in url:
        path = Path(url).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{path}"
    try:
        parsed = make_url(url)
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.get_backend_name() != "sqlite":
            return create_engine(parsed, pool_pre_ping=True)
        engine = create_engine(parsed, connect_args={"timeout": busy_seconds, "check_same_thread": False})
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        scheme = url.partition("://")[0]  # the rest may hold a password
        raise InputError(f"{scheme}://...: not the URL of a database ({type(error).__name__})") from None
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself; `_begin_sqlite` does
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    """A writer takes the lock at once: one that starts as a reader could not become a writer later."""
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextlib.contextmanager
def _telling() -> Iterator[None]:
    try:
        yield
    except IntegrityError:  # a rule of the tables, not the database's health
        raise
    except DBAPIError as error:
        raise StoreUnavailableError(
            f"the database did not take this, and nothing was saved: {error.orig}"
        ) from error
