"""Sign-in, sessions and their end."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select

from feedback import accounts
from feedback.errors import ConflictError, InputError
from feedback.records import EventType, Role
from feedback.store import Store
from feedback.tables import credentials, sessions

from .conftest import person


def test_a_secret_and_a_session_are_stored_as_hashes_only(store):
    _, secret = accounts.add_annotator(store, "system", "ann")
    _, token = accounts.sign_in(store, "ann", secret)
    with store.read() as connection:
        stored = connection.scalar(select(credentials.c.secret))
        session = connection.scalar(select(sessions.c.token))
    assert stored.startswith("$argon2id$")
    assert secret not in stored
    assert token not in session
    assert secret not in repr(store.events())


@pytest.mark.parametrize(("name", "secret"), [("ann", "wrong secret"), ("nobody", "secret of ann"), ("", "")])
def test_a_wrong_sign_in_is_refused_and_logged_without_the_secret(store, name, secret):
    person(store, "ann")
    assert accounts.sign_in(store, name, secret) is None
    last = store.events(newest=1)[0]
    assert last.type is EventType.SIGN_IN_FAILED
    assert "secret" not in repr(last.payload)


def test_a_session_ends_when_idle_too_old_or_signed_out(store, clock):
    ann = person(store, "ann")

    def begin():
        return accounts.sign_in(store, "ann", "secret of ann")[1]

    token = begin()
    clock.pass_by(accounts.IDLE_SECONDS - 1)
    assert accounts.find_session(store, token) == ann
    clock.pass_by(accounts.IDLE_SECONDS - 1)  # the visit before began the idle time anew
    assert accounts.find_session(store, token) == ann
    clock.pass_by(accounts.IDLE_SECONDS + 1)
    assert accounts.find_session(store, token) is None

    token = begin()
    for _ in range(int(accounts.SESSION_SECONDS / 20_000) + 1):
        assert accounts.find_session(store, token) == ann
        clock.pass_by(20_000)
    assert accounts.find_session(store, token) is None

    token = begin()
    accounts.sign_out(store, token, ann)
    assert accounts.find_session(store, token) is None


def test_who_only_reads_gets_on_while_nothing_can_be_written(tmp_path, clock):
    store = Store(tmp_path / "locked.db", clock=clock, busy_seconds=0.1)
    ann = person(store, "ann")
    token = accounts.sign_in(store, "ann", "secret of ann")[1]
    clock.pass_by(3600)
    other = sqlite3.connect(tmp_path / "locked.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert accounts.find_session(store, token) == ann
    other.execute("ROLLBACK")
    other.close()
    clock.pass_by(accounts.IDLE_SECONDS - 1800)  # that visit was not noted
    assert accounts.find_session(store, token) is None
    store.close()


def test_who_is_made_inactive_is_out_at_once(store):
    ann = person(store, "ann")
    token = accounts.sign_in(store, "ann", "secret of ann")[1]
    accounts.change_annotator(store, "system", ann.id, active=False)
    assert accounts.find_session(store, token) is None
    assert accounts.sign_in(store, "ann", "secret of ann") is None


def test_a_new_secret_ends_the_sessions_and_the_old_secret(store):
    ann = person(store, "ann")
    token = accounts.sign_in(store, "ann", "secret of ann")[1]
    secret = accounts.new_secret(store, ann.id)
    assert accounts.find_session(store, token) is None
    assert accounts.sign_in(store, "ann", "secret of ann") is None
    assert accounts.sign_in(store, "ann", secret) is not None


def test_the_last_manager_stays_one(store):
    boss = person(store, "boss", Role.MANAGER)
    for change in ({"role": Role.ANNOTATOR}, {"active": False}):
        with pytest.raises(ConflictError, match="only active manager"):
            accounts.change_annotator(store, "system", boss.id, **change)
    person(store, "other", Role.MANAGER)
    assert accounts.change_annotator(store, "system", boss.id, role=Role.ANNOTATOR).role is Role.ANNOTATOR


def test_of_two_managers_that_are_erased_at_once_one_stays(store, clock, monkeypatch):
    ann, bob = (person(store, name, Role.MANAGER) for name in ("ann", "bob"))
    both_counted, count = threading.Barrier(2), accounts._managers

    def counted(connection):
        found = count(connection)
        with contextlib.suppress(threading.BrokenBarrierError):  # the other one must wait for its turn
            both_counted.wait(timeout=0.5)
        return found

    monkeypatch.setattr(accounts, "_managers", counted)
    other = Store(store.engine.url.render_as_string(hide_password=False), clock=clock)
    with ThreadPoolExecutor() as pool:
        tries = [
            pool.submit(accounts.erase_account, place, "system", who.id, "asked")
            for place, who in ((store, ann), (other, bob))
        ]
    other.close()
    assert {type(one.exception()) for one in tries} == {type(None), ConflictError}
    with store.read() as connection:
        assert count(connection) == 1


def test_names_are_taken_once_and_secrets_have_a_length(store):
    person(store, "ann")
    with pytest.raises(ConflictError, match="'ann' is taken"):
        person(store, "ann")
    with pytest.raises(InputError, match="10 to 1000 characters, found 5"):
        accounts.add_annotator(store, "system", "bob", secret="short")
