"""Collections: opened once, ended once, told once, whoever looks and whenever."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest

from feedback import accounts, assignment, gathering
from feedback.errors import ConflictError, InputError
from feedback.projects import create_project
from feedback.records import Choice, Project
from feedback.store import Store
from feedback.watching import (
    CLAIM_SECONDS,
    Progress,
    Watched,
    claim,
    close_collection,
    expected_end,
    find_collection,
    list_collections,
    note_announced,
    open_collection,
    progress,
    settle,
)

from .conftest import Clock, pair, person

NICE = Choice(choice="a", strength=1)
PROJECT = Project(id="p", name="Pairs", kind="pairwise", gold_share=0.0)


def opened(store, count=3, **options):
    project = options.pop("project", PROJECT)
    return open_collection(store, project, [pair(n) for n in range(count)], **options)


def vote(store, who, times=1):
    for _ in range(times):
        shown = assignment.next_item(store, who, "p")
        assignment.cast_vote(store, who, shown.item.id, f"{shown.item.id}-{who.name}", NICE, 2.0)


def test_it_is_opened_once_with_all_its_items(store):
    assert opened(store, about={"choose": "random"})
    assert not opened(store, count=5)
    (found,) = list_collections(store)
    assert (found.id, found.wanted, found.deadline, found.about) == ("p", 3, None, {"choose": "random"})
    assert found.is_open
    assert gathering.queue_state(store, "p").num_items == 3


def test_a_project_that_is_no_collection_is_not_taken_for_one(store):
    create_project(store, "system", PROJECT, [pair(1)])
    with pytest.raises(ConflictError, match="exists already, and is no collection"):
        opened(store)
    assert list_collections(store) == []
    with pytest.raises(InputError, match="there is no collection 'p'"):
        settle(store, "p")


def test_nothing_is_made_of_a_collection_without_items(store):
    with pytest.raises(InputError, match="no items"):
        opened(store, count=0)
    right = {"kind": "choice", "choice": "a", "strength": 1}
    with pytest.raises(InputError, match="all items are gold"):
        open_collection(store, PROJECT, [pair(1, gold=right)])
    assert list_collections(store) == []
    assert opened(store)


def test_it_ends_with_the_votes_wanted_and_only_once(store, clock):
    opened(store, votes_wanted=2, deadline_hours=1.0)
    ann = person(store, "ann")
    vote(store, ann)
    assert settle(store, "p").is_open
    vote(store, ann)
    found = settle(store, "p")
    assert (found.reason, found.votes, found.ended) == ("votes", 2, clock())
    clock.pass_by(7200)
    vote(store, ann)  # is kept, and changes nothing of how it ended
    assert settle(store, "p") == found


def test_all_votes_needed_are_those_of_the_overlap(store):
    project = PROJECT.model_copy(update={"overlap_votes": 2, "overlap_share": 1.0})
    opened(store, count=2, project=project)
    assert find_collection(store, "p").wanted == 4
    vote(store, person(store, "ann"), 2)
    assert settle(store, "p").is_open
    vote(store, person(store, "bob"), 2)
    assert settle(store, "p").reason == "votes"


def test_more_votes_than_can_be_given_are_not_waited_for(store):
    opened(store, votes_wanted=50)
    assert find_collection(store, "p").wanted == 3


@pytest.mark.parametrize("votes", [0, 1])
def test_the_deadline_ends_it_with_the_votes_there_are(store, clock, votes):
    opened(store, deadline_hours=2.0)
    assert find_collection(store, "p").deadline == clock() + timedelta(hours=2)
    if votes:
        vote(store, person(store, "ann"))
    clock.pass_by(2 * 3600 - 1)
    assert settle(store, "p").is_open
    clock.pass_by(1)
    found = settle(store, "p")
    assert (found.reason, found.votes) == ("deadline", votes)
    assert found.untold


def test_items_that_nobody_can_be_asked_about_are_not_waited_for(store):
    opened(store, count=2)
    ann = person(store, "ann")
    shown = assignment.next_item(store, ann, "p")
    assignment.flag_item(store, ann, shown.item.id, "rude")
    assert settle(store, "p").is_open
    vote(store, ann)
    assert (settle(store, "p").reason, settle(store, "p").votes) == ("votes", 1)


def test_flags_alone_are_no_votes(store):
    opened(store, count=1)
    ann = person(store, "ann")
    assignment.flag_item(store, ann, assignment.next_item(store, ann, "p").item.id, "rude")
    assert settle(store, "p").is_open


def test_excluded_people_do_not_count(store):
    opened(store, count=1)
    ann = person(store, "ann")
    vote(store, ann)
    accounts.change_annotator(store, "system", ann.id, excluded=True)
    assert settle(store, "p").is_open


def test_closed_by_hand_nobody_is_told(store):
    opened(store)
    found = close_collection(store, "manager", "p")
    assert (found.reason, found.is_open, found.untold) == ("closed", False, False)
    assert not claim(store, "p")
    assert close_collection(store, "other", "p") == found


def ended(store, clock):
    opened(store, deadline_hours=1.0)
    clock.pass_by(3600)
    return settle(store, "p")


def test_one_watcher_tells_and_one_that_died_is_followed(store, clock):
    ended(store, clock)
    assert claim(store, "p")
    assert not claim(store, "p")
    clock.pass_by(CLAIM_SECONDS - 1)
    assert not claim(store, "p")
    clock.pass_by(1)
    assert claim(store, "p")  # the first has died
    note_announced(store, "p")
    note_announced(store, "p")
    clock.pass_by(10 * CLAIM_SECONDS)
    assert not claim(store, "p")
    assert [event.type for event in store.events()].count("collection_announced") == 1


def test_of_many_watchers_at_once_one_ends_it_and_one_tells(tmp_path):
    clock = Clock()
    path = tmp_path / "many.db"
    first = Store(path, clock=clock)
    opened(first, deadline_hours=1.0)
    clock.pass_by(3600)
    start, mine = threading.Barrier(6), []

    def watch():
        own = Store(path, clock=clock)
        start.wait()
        settle(own, "p")
        mine.append(claim(own, "p"))
        own.close()

    threads = [threading.Thread(target=watch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kinds = [event.type for event in first.events()]
    assert (kinds.count("collection_ended"), sorted(mine)) == (1, [False] * 5 + [True])
    first.close()


def test_a_rebuild_and_an_erased_person_change_nothing_of_how_it_ended(store, clock):
    opened(store, votes_wanted=1)
    ann = person(store, "ann")
    vote(store, ann)
    before = settle(store, "p")
    store.rebuild()
    accounts.erase_account(store, "system", ann.id, "asked for it")
    assert list_collections(store) == [before]
    assert progress(store, "p").by_annotator == {}


def test_progress_counts_by_person_and_leaves_gold_and_old_votes_apart(store, clock):
    right = {"kind": "choice", "choice": "a", "strength": 1}
    rows = [pair(n, gold=right if n >= 20 else None) for n in range(26)]  # no gold drawn: once in a million
    rules = {"overlap_votes": 2, "overlap_share": 1.0, "gold_share": 0.5}
    open_collection(store, PROJECT.model_copy(update=rules), rows)
    ann, bob = person(store, "ann"), person(store, "bob")
    while assignment.next_item(store, ann, "p"):
        vote(store, ann)
    assert len(gathering.gather(store, "p").votes) > 20  # some on gold items
    clock.pass_by(25 * 3600)
    while progress(store, "p").votes < 21:
        vote(store, bob)
    state = progress(store, "p")
    assert state.by_annotator == {ann.id: 20, bob.id: 1}
    assert (state.votes, state.recent) == (21, 1)


def test_the_expected_end_by_hand(clock):
    opened_at = clock()
    found = Watched("p", opened_at, wanted=10, deadline=None)
    # 4 votes in 2 hours: 6 more take 3 hours.
    now = opened_at + timedelta(hours=2)
    assert expected_end(found, Progress(now, 4, {"ann": 4}, recent=4)) == now + timedelta(hours=3)
    # Of three days the last 24 hours count: 2 votes in them, so 1 more takes 12 hours.
    now = opened_at + timedelta(days=3)
    assert expected_end(found, Progress(now, 9, {"ann": 9}, recent=2)) == now + timedelta(hours=12)
    assert expected_end(found, Progress(now, 9, {"ann": 9}, recent=0)) is None
