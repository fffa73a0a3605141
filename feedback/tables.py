"""The tables of the store: the log, the views that the log makes, and secrets that are no part of either."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)

metadata = MetaData()
ID = String(128)
TIME = String(32)  # ISO 8601 in UTC with microseconds, so that texts sort as times do

events = Table(
    "events",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("at", TIME, nullable=False),
    Column("actor", ID, nullable=False),
    Column("subject", ID, index=True),  # the person whose data the payload holds
    Column("type", String(40), nullable=False),
    Column("payload", JSON, nullable=False),
    sqlite_autoincrement=True,  # a number is never given twice
)

projects = Table(
    "projects",
    metadata,
    Column("id", ID, primary_key=True),
    Column("record", JSON, nullable=False),
    Column("created", Integer, nullable=False),  # number of the event
)

items = Table(
    "items",
    metadata,
    Column("id", ID, primary_key=True),
    Column("project", ID, nullable=False),
    Column("record", JSON, nullable=False),
    Column("position", Integer, nullable=False),  # number of the event: the order of the queue
    Column(
        "chance", Float, nullable=False
    ),  # from 0 to 1 by the project's seed: the overlap, the order of gold
    Column("is_gold", Boolean, nullable=False),
    Column("needed", Integer, nullable=False),  # votes; 0 for gold items, which everybody gets
    Column("votes", Integer, nullable=False, server_default="0"),  # that count
    Column("flagged", Boolean, nullable=False, server_default=false()),
    Index("items_queue", "project", "is_gold", "position"),
)

annotators = Table(
    "annotators",
    metadata,
    Column("id", ID, primary_key=True),
    Column("name", String(200), nullable=False, unique=True),
    Column("role", String(20), nullable=False),
    Column("active", Boolean, nullable=False),
    Column("excluded", Boolean, nullable=False),
)

votes = Table(
    "votes",
    metadata,
    Column("id", ID, primary_key=True),  # the client's key
    Column("project", ID, nullable=False),
    Column("item", ID, nullable=False, index=True),
    Column("annotator", ID, nullable=False),
    Column("record", JSON, nullable=False),
    Column("number", Integer, nullable=False),
    Column("undone", Boolean, nullable=False, server_default=false()),
    Index("votes_of_annotator", "annotator", "project"),
)
Index(
    "one_vote_each",
    votes.c.item,
    votes.c.annotator,
    unique=True,
    sqlite_where=votes.c.undone.is_(False),
    postgresql_where=votes.c.undone.is_(False),
)

leases = Table(
    "leases",
    metadata,
    Column("item", ID, primary_key=True),
    Column("annotator", ID, primary_key=True),
    Column("project", ID, nullable=False),
    Column("sides", JSON, nullable=False),
    Column("taken", TIME, nullable=False),
    Column("expires", TIME, nullable=False),
    Column("number", Integer, nullable=False),
    Index("leases_of_annotator", "annotator", "project"),
)

skips = Table(
    "skips",
    metadata,
    Column("item", ID, primary_key=True),
    Column("annotator", ID, primary_key=True),
    Column("project", ID, nullable=False),
    Column("reason", Text, nullable=False),
    Column("sides", JSON, nullable=False),
    Column("number", Integer, nullable=False),
)

flags = Table(
    "flags",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("item", ID, nullable=False, index=True),
    Column("annotator", ID, nullable=False),
    Column("project", ID, nullable=False),
    Column("reason", Text, nullable=False),
    Column("sides", JSON, nullable=False),
    Column("cleared", Boolean, nullable=False, server_default=false()),
)

chat_turns = Table(
    "chat_turns",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("item", ID, nullable=False),
    Column("annotator", ID, nullable=False),
    Column("key", ID, nullable=False),  # the client's: a message sent twice is asked once
    Column("user", Text, nullable=False),
    Column("replies", JSON, nullable=False),  # by response, not by side
    UniqueConstraint("item", "annotator", "key", name="one_turn_each"),
)

adjudications = Table(
    "adjudications",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),  # the last one of an item stands
    Column("item", ID, nullable=False, index=True),
    Column("project", ID, nullable=False, index=True),
    Column("adjudicator", ID, nullable=False),
    Column("value", JSON, nullable=False),
    Column("at", TIME, nullable=False),
)

VIEWS = (projects, items, annotators, votes, leases, skips, flags, chat_turns, adjudications)
"""What the log makes; `Store.rebuild` empties these and makes them again."""

credentials = Table(
    "credentials",
    metadata,
    Column("annotator", ID, primary_key=True),
    Column("secret", String(255), nullable=False),  # argon2 hash
)

sessions = Table(
    "sessions",
    metadata,
    Column("token", String(64), primary_key=True),  # sha256 of the cookie
    Column("annotator", ID, nullable=False, index=True),
    Column("started", TIME, nullable=False),
    Column("seen", TIME, nullable=False),
)
