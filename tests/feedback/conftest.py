"""A store with a clock that tests turn, and projects of every kind."""

from __future__ import annotations

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
