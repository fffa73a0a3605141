"""The store as it was at an event, and which votes are new."""

from __future__ import annotations

import pytest

from feedback import accounts, assignment
from feedback.gathering import gather
from feedback.history import as_of, last_event, store_id, votes_at
from feedback.records import Choice
from feedback.store import Store

from .conftest import pairs, person

A = Choice(choice="a", strength=2)


def vote(store, who, key, value=A):
    shown = assignment.next_item(store, who, "p")
    return assignment.cast_vote(store, who, shown.item.id, key, value, 5.0)


@pytest.fixture
def voted(store):
    """Three votes of Ann and one of Bob; the event after each."""
    pairs(store, 5)
    ann, bob = person(store, "ann"), person(store, "bob")
    numbers = []
    for who, key in ((ann, "v1"), (ann, "v2"), (bob, "v3"), (ann, "v4")):
        vote(store, who, key)
        numbers.append(last_event(store))
    return ann, bob, numbers


def ids(votes):
    return {vote.id for collection in votes.collections for vote in collection.votes}


def test_votes_up_to_an_event_are_those_cast_by_then_whatever_came_later(store, voted):
    ann, bob, (first, second, third, fourth) = voted
    assert ids(votes_at(store, second, 0)) == {"v1", "v2"}
    assert ids(votes_at(store, fourth, 0)) == {"v1", "v2", "v3", "v4"}
    assert ids(votes_at(store, first - 1, 0)) == set()
    before = votes_at(store, third, 0)
    assignment.undo(store, ann, "p")  # takes v4 back
    accounts.change_annotator(store, "system", bob.id, excluded=True)
    assert votes_at(store, third, 0) == before
    assert ids(votes_at(store, last_event(store), 0)) == {"v1", "v2"}


def test_new_are_the_votes_after_an_event_that_still_count(store, voted):
    ann, bob, (_, second, _, fourth) = voted
    found = votes_at(store, fourth, second)
    assert found.new == {"v3", "v4"}
    (collection,) = found.collections
    assert found.new_items == {vote.item for vote in collection.votes if vote.id in ("v3", "v4")}
    assert votes_at(store, fourth, fourth).new == frozenset()
    assignment.undo(store, ann, "p")
    assert votes_at(store, last_event(store), second).new == {"v3"}
    accounts.change_annotator(store, "system", bob.id, excluded=True)
    assert votes_at(store, last_event(store), second).new == frozenset()


def test_windows_one_after_the_other_hold_each_vote_once(store, voted):
    """No vote is lost or doubled between retrainings, wherever the cuts are."""
    end = last_event(store)
    for cut in range(end + 1):
        first, second = votes_at(store, cut, 0), votes_at(store, end, cut)
        assert first.new & second.new == set()
        assert first.new | second.new == {"v1", "v2", "v3", "v4"}
        assert first.num_votes == len(first.new)


def test_views_of_the_past_are_those_that_stood_then(store, voted):
    _, _, numbers = voted
    now = gather(store, "p")
    with as_of(store, numbers[-1]) as then:
        assert gather(then, "p") == now
        assert last_event(then) == numbers[-1]
        assert then.events() == store.events()
    with as_of(store, 0) as then:
        assert last_event(then) == 0
    assert last_event(store) == numbers[-1], "the store itself is as it was"


def test_an_erased_person_is_missing_from_the_past_too(store, voted):
    ann, _, numbers = voted
    accounts.erase_account(store, "system", ann.id, "asked for")
    found = votes_at(store, numbers[-1], 0)
    assert ids(found) == found.new == {"v3"}


def test_logs_have_different_names_that_stay(store, clock, tmp_path):
    assert store_id(store) == ""
    pairs(store, 2)
    first = store_id(store)
    vote(store, person(store, "ann"), "v1")
    assert store_id(store) == first
    clock.pass_by(1)
    other = Store(tmp_path / "other.db", clock=clock)
    pairs(other, 2)
    assert store_id(other) not in ("", first)
    other.close()
