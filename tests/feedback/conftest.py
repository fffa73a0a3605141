"""A store with a clock that tests turn, and projects of every kind."""

from __future__ import annotations

import html
import re
from datetime import UTC, datetime, timedelta

import pytest

from feedback import accounts
from feedback.projects import create_project
from feedback.records import Item, Project, Role
from feedback.store import Store


class Clock:
    def __init__(self):
        self.now = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)

    def __call__(self):
        return self.now

    def pass_by(self, seconds):
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    opened = Store(tmp_path / "feedback.db", clock=clock)
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def _cheap_hashes(monkeypatch):
    """The real argon2 at its least cost: what is hashed here is no secret."""
    from argon2 import PasswordHasher

    monkeypatch.setattr(accounts, "_hasher", PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))
    accounts._nobodys_hash.cache_clear()


def person(store, name, role=Role.ANNOTATOR):
    return accounts.add_annotator(store, "system", name, role, f"secret of {name}")[0]


def pair(number, project="p", **fields):
    return Item(
        id=f"{project}-{number}",
        project=project,
        kind="pairwise",
        messages=[{"role": "user", "content": f"question {number}"}],
        responses=[
            {"text": f"first {number}", "policy": "sft"},
            {"text": f"second {number}", "policy": "ppo"},
        ],
        **fields,
    )


def pairs(store, count=5, gold=0, **fields):
    """A project `p` of pairs, the last `gold` of them with a known vote."""
    right = {"kind": "choice", "choice": "a", "strength": 1}
    project = Project(**({"id": "p", "name": "Pairs", "kind": "pairwise", "gold_share": 0.0} | fields))
    rows = [pair(n, gold=right if n >= count - gold else None) for n in range(count)]
    create_project(store, "system", project, rows)
    return project


class Visitor:
    """A browser without scripts: keeps its cookie and fills the forms that it finds."""

    def __init__(self, app, name="", base="http://127.0.0.1"):
        from starlette.testclient import TestClient

        self.http = TestClient(app, base_url=base, follow_redirects=False)
        if name:
            answer = self.http.post("/login", data={"name": name, "secret": f"secret of {name}"})
            assert answer.status_code == 303, answer.text

    def get(self, path, **options):
        return self.http.get(path, **options)

    def fields(self, path, form="vote"):
        """The hidden fields of a form of a page."""
        text = self.get(path).text
        body = re.search(rf'<form[^>]*id="{form}".*?</form>', text, re.S) or re.search(
            rf'<form[^>]*action="[^"]*/{form}".*?</form>', text, re.S
        )
        assert body, text
        hidden = re.findall(r'type="hidden" name="([^"]+)" value="([^"]*)"', body.group(0))
        return {name: html.unescape(value) for name, value in hidden}

    def vote(self, project="p", **values):
        return self.http.post(f"/p/{project}/vote", data=self.fields(f"/p/{project}") | values)

    def script(self, path, data):
        """As the page's script sends."""
        return self.http.post(path, data=data, headers={"Accept": "application/json"})

    @property
    def csrf(self):
        return re.search(r'name="csrf" value="([^"]+)"', self.get("/").text).group(1)


@pytest.fixture
def app(store):
    from feedback.policies import EchoPolicy
    from feedback.web.app import create_app
    from feedback.web.context import Settings

    policies = {"x": EchoPolicy("Left out"), "y": EchoPolicy("Put in")}
    return create_app(store, Settings(policies=policies))


@pytest.fixture
def visitor(app, store):
    """Make an account and sign it in."""

    def come(name="ann", role=Role.ANNOTATOR):
        person(store, name, role)
        return Visitor(app, name)

    return come
