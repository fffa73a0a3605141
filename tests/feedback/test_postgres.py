"""The same store on PostgreSQL; skips where the machine has none."""

from __future__ import annotations

import importlib.util
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, make_url, text

from feedback import accounts, assignment
from feedback.errors import FeedbackError, StoreUnavailableError
from feedback.gathering import gather, queue_state
from feedback.policies import EchoPolicy
from feedback.records import Choice
from feedback.store import Store
from feedback.tables import metadata
from feedback.web.app import create_app
from feedback.web.context import Settings

from .conftest import Clock, Visitor, pairs, person


@pytest.fixture(scope="module")
def server(root):
    """The URL of a PostgreSQL that runs for this module."""
    path = root / "tests" / "pipeline" / "postgres.py"
    if not path.is_file():
        pytest.skip("tests/pipeline/postgres.py is not here")
    spec = importlib.util.spec_from_file_location("postgres_for_feedback", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.serving() as url:
        yield url


@pytest.fixture
def postgres(server):
    url = make_url(server).set(drivername="postgresql+psycopg")
    name = f"feedback_{random.randrange(10**9)}"
    engine = create_engine(url.set(database="postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    opened = Store(url.set(database=name).render_as_string(hide_password=False), clock=Clock())
    yield opened
    opened.close()


def test_tables_are_those_of_the_code(postgres):
    with postgres.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_threads_share_a_queue_and_a_rebuild_gives_the_views_again(postgres):
    pairs(postgres, 40, gold=5, overlap_votes=2, overlap_share=0.5, gold_share=0.2)
    people = [person(postgres, f"person {n}") for n in range(6)]

    def work(who):
        done, drawn = 0, random.Random(who.name)
        while shown := assignment.next_item(postgres, who, "p"):
            act = drawn.random()
            try:
                if act < 0.1:
                    assignment.skip_item(postgres, who, shown.item.id, "no")
                elif act < 0.15:
                    assignment.undo(postgres, who, "p")
                else:
                    key = f"{who.id}-{done}"
                    assignment.cast_vote(postgres, who, shown.item.id, key, Choice(choice="tie"), 1.0)
                    done += 1
            except FeedbackError:
                continue

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, people))
    state = queue_state(postgres, "p")
    assert state.votes_given == state.votes_needed
    assert all(
        len(votes) <= 2
        for item, votes in gather(postgres, "p").by_item.items()
        if gather(postgres, "p").by_id[item].gold is None
    )
    before = postgres.views()
    postgres.rebuild()
    assert postgres.views() == before
    accounts.erase_account(postgres, "system", people[0].id, "asked")
    before = postgres.views()
    postgres.rebuild()
    assert postgres.views() == before


def test_the_pages_work_on_it_with_any_character(postgres):
    pairs(postgres, 2)
    person(postgres, "ann")
    app = create_app(postgres, Settings(policies={"x": EchoPolicy()}))
    ann = Visitor(app, "ann")
    reason = "null \x00 emoji \U0001f600 \u202e"
    assert ann.http.post("/p/p/flag", data=ann.fields("/p/p", "flag") | {"reason": reason}).status_code == 303
    assert ann.vote(choice="1:3").status_code == 303


def test_a_server_that_is_away_is_told():
    with pytest.raises(StoreUnavailableError, match="nothing was saved"):
        Store("postgresql://nobody:x@127.0.0.1:9/none?connect_timeout=2")
