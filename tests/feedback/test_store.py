"""The log gives every view again; migrations, erasure, and a database that is locked, full or none."""

from __future__ import annotations

import sqlite3

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from feedback import accounts, assignment
from feedback.errors import FeedbackError, InputError, StoreUnavailableError
from feedback.gathering import adjudicate, gather, queue_state
from feedback.projects import change_guidelines, create_project
from feedback.records import Choice, EventType, Item, Project, Role
from feedback.store import Store
from feedback.tables import credentials, events, metadata, sessions

from .conftest import Clock, pair, pairs, person

STEPS = (
    "vote",
    "tie",
    "skip",
    "flag",
    "clear",
    "undo",
    "exclude",
    "include",
    "wait",
    "erase",
    "guide",
    "turn",
    "decide",
)


def test_migrations_make_the_tables_that_the_code_expects(store):
    with store.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_sqlite_keeps_what_it_acknowledged_through_a_power_cut(store):
    with store.read() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL


def step(store, clock, who, act, number):
    """One thing that a person may do; what the rules forbid changes nothing."""
    project = "c" if act == "turn" else "p"
    if act == "wait":
        return clock.pass_by(45)
    if act in ("exclude", "include"):
        return accounts.change_annotator(store, "system", who.id, excluded=act == "exclude")
    if act == "guide":
        return change_guidelines(store, "system", "p", f"rule {number}")
    if act == "undo":
        return assignment.undo(store, who, "p")
    if act == "decide":
        return adjudicate(store, who.id, "p", pair(number % 5), Choice(choice="tie"))
    shown = assignment.next_item(store, who, project)
    if shown is None:
        return None
    if act == "skip":
        return assignment.skip_item(store, who, shown.item.id, "why not")
    if act in ("flag", "clear"):
        assignment.flag_item(store, who, shown.item.id, "odd")
        return act == "clear" and assignment.clear_flag(store, "system", shown.item.id)
    if act == "turn":
        return assignment.add_turn(store, who, shown.item.id, f"t{number}", "hi", ("x", "y"))
    value = Choice(choice="tie") if act == "tie" else Choice(choice="b", strength=3)
    return assignment.cast_vote(store, who, shown.item.id, f"key-{number}", value, 2.0)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    acts=st.lists(st.tuples(st.integers(0, 2), st.sampled_from(STEPS)), min_size=5, max_size=40),
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_the_views_are_what_the_log_makes_of_them(tmp_path_factory, acts, share):
    clock = Clock()
    store = Store(tmp_path_factory.mktemp("store") / "f.db", clock=clock)
    pairs(store, 6, gold=1, overlap_votes=2, overlap_share=share, gold_share=0.3, lease_seconds=60)
    chat = Item(id="c-1", project="c", kind="chat", responses=[{"policy": "x"}, {"policy": "y"}])
    create_project(store, "system", Project(id="c", name="Chat", kind="chat"), [chat])
    people = [person(store, name) for name in ("ann", "bob", "cem")]
    erased = set()
    for number, (index, act) in enumerate(acts):
        who = people[index]
        if who.id in erased:
            continue
        try:
            if act == "erase":
                erased.add(who.id)
                accounts.erase_account(store, "system", who.id, "asked")
            else:
                step(store, clock, who, act, number)
        except FeedbackError:
            continue
    before = store.views()
    assert store.rebuild() == len(store.events())
    assert store.views() == before
    store.close()


def test_a_view_that_was_tampered_with_is_mended_by_a_rebuild(store):
    pairs(store, 3)
    before = store.views()
    with store.write() as connection:
        connection.exec_driver_sql("UPDATE items SET votes = 99")
        connection.exec_driver_sql("DELETE FROM projects")
    assert store.views() != before
    store.rebuild()
    assert store.views() == before


def test_erasing_a_person_leaves_no_trace_of_name_vote_or_text(store, tmp_path):
    pairs(store, 3)
    boss = person(store, "boss", Role.MANAGER)
    ann = person(store, "Annika Unmistakable", Role.MANAGER)
    accounts.sign_in(store, "Annika Unmistakable", "secret of Annika Unmistakable")
    shown = assignment.next_item(store, ann, "p")
    assignment.cast_vote(store, ann, shown.item.id, "k", Choice(choice="tie"), 1.0)
    shown = assignment.next_item(store, ann, "p")
    assignment.flag_item(store, ann, shown.item.id, "unmistakable reason")
    count = len(store.events())
    emptied = accounts.erase_account(store, "system", ann.id, "asked")
    assert emptied == 6, "account, sign-in, two leases, vote, flag"
    assert len(store.events()) == count + 1
    with store.read() as connection:
        everything = [
            repr(row) for table in metadata.sorted_tables for row in connection.execute(select(table))
        ]
    for trace in (ann.id, "Unmistakable", "unmistakable"):
        assert not [row for row in everything if trace in row]
    with store.read() as connection:
        assert connection.scalars(select(credentials.c.annotator)).all() == [boss.id]
        assert not connection.execute(select(sessions)).all()
    assert assignment.next_item(store, person(store, "bob"), "p").item.id == "p-0"


def test_numbers_of_the_log_are_never_given_twice(store):
    store.log("system", EventType.EXPORTED, {})
    with store.write() as connection:
        connection.execute(events.delete())
    assert store.log("system", EventType.EXPORTED, {}).number == 2


def test_a_transaction_that_fails_leaves_neither_event_nor_view(store):
    pairs(store, 2)
    before, log = store.views(), len(store.events())

    def half():
        with store.write() as connection:
            broken(connection)

    def broken(connection):
        store.append(
            connection,
            "system",
            EventType.ITEM_FLAGGED,
            dict.fromkeys(("item", "annotator", "project", "reason"), "p-0") | {"sides": [0, 1]},
        )
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        half()
    assert (store.views(), len(store.events())) == (before, log)


def test_a_locked_database_refuses_and_keeps_nothing(store, tmp_path, clock):
    pairs(store, 2)
    hasty = Store(tmp_path / "feedback.db", clock=clock, busy_seconds=0.1)
    ann = person(store, "ann")
    shown = assignment.next_item(hasty, ann, "p")
    other = sqlite3.connect(tmp_path / "feedback.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailableError, match="nothing was saved"):
        assignment.cast_vote(hasty, ann, shown.item.id, "k", Choice(choice="tie"), 1.0)
    other.execute("ROLLBACK")
    other.close()
    assert assignment.cast_vote(hasty, ann, shown.item.id, "k", Choice(choice="tie"), 1.0).id == "k"
    hasty.close()


def test_a_full_disk_refuses_and_what_was_acknowledged_stays(store, tmp_path):
    """SQLite's own limit on pages gives the same error as a disk without space."""
    pairs(store, 50)
    ann = person(store, "ann")
    kept = []
    with store.read() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()

    from sqlalchemy import event

    @event.listens_for(store.engine, "begin")
    def _limit(connection):
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 4}")

    def work():
        for number in range(50):
            shown = assignment.next_item(store, ann, "p")
            assignment.cast_vote(store, ann, shown.item.id, f"k{number}", Choice(choice="tie"), 1.0)
            kept.append(f"k{number}")

    with pytest.raises(StoreUnavailableError, match="full"):
        work()
    store.close()
    again = Store(tmp_path / "feedback.db")
    assert [vote[0] for vote in again.views()["votes"]] == sorted(kept)
    assert kept
    again.close()


@pytest.mark.parametrize("url", ["nonsense://x", "://", "oracle+nothing://h/d"])
def test_a_url_of_no_database_is_refused_with_its_text(url):
    with pytest.raises(InputError, match="not the URL of a database"):
        Store(url)


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "notes.db").write_text("these are my notes, not a database" * 40)
    with pytest.raises(StoreUnavailableError, match="not a database"):
        Store(tmp_path / "notes.db")
    assert (tmp_path / "notes.db").read_text().startswith("these are my notes")


def test_what_an_erased_person_replaced_comes_back_live_as_in_a_rebuild(store, clock):
    pairs(store, 2, overlap_votes=2, overlap_share=1.0)
    ann, bob = person(store, "ann"), person(store, "bob")
    shown = [assignment.next_item(store, who, "p") for who in (ann, bob)]
    assert shown[0].item == shown[1].item
    for who in (ann, bob):
        assignment.flag_item(store, who, shown[0].item.id, "odd")
    assignment.undo(store, ann, "p")  # bob's flag stays
    assert queue_state(store, "p").num_flagged == 1
    for who, choice in ((bob, "tie"), (ann, "bad")):
        adjudicate(store, who.id, "p", shown[0].item, Choice(choice=choice))
        clock.pass_by(1)  # the later decision stands
    assert gather(store, "p").decided[shown[0].item.id].value.choice == "bad"
    accounts.erase_account(store, "system", ann.id, "asked")
    assert gather(store, "p").decided[shown[0].item.id].value.choice == "tie"
    before = store.views()
    store.rebuild()
    assert store.views() == before
