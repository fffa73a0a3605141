"""What is shown to whom, and that each vote counts exactly once."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select

from feedback import accounts, assignment
from feedback.errors import ConflictError, InputError, KeyUsedError, NotAllowedError
from feedback.projects import create_project
from feedback.records import Choice, Item, Label, Project
from feedback.tables import items, votes

from .conftest import pairs, person

A = Choice(choice="a", strength=2)
TIE = Choice(choice="tie")


def vote(store, who, shown, key, value=A):
    return assignment.cast_vote(store, who, shown.item.id, key, value, 1.0)


def standing(store):
    with store.read() as connection:
        return connection.execute(select(votes).where(votes.c.undone.is_(False))).all()


def test_an_item_stays_with_who_holds_it_and_goes_to_nobody_else(store):
    pairs(store, 2)
    ann, bob = person(store, "ann"), person(store, "bob")
    first = assignment.next_item(store, ann, "p")
    assert assignment.next_item(store, ann, "p") == first
    assert assignment.next_item(store, bob, "p").item.id != first.item.id
    assert assignment.next_item(store, person(store, "cem"), "p") is None


def test_a_lease_that_ran_out_lets_another_in_and_both_votes_count(store, clock):
    pairs(store, 1, lease_seconds=60)
    ann, bob = person(store, "ann"), person(store, "bob")
    shown = assignment.next_item(store, ann, "p")
    clock.pass_by(59)
    assert assignment.next_item(store, bob, "p") is None
    clock.pass_by(1)
    late = assignment.next_item(store, bob, "p")
    assert late.item == shown.item
    vote(store, bob, late, "bob-1")
    vote(store, ann, shown, "ann-1")
    assert len(standing(store)) == 2


def test_a_lease_that_ran_out_is_renewed_for_its_holder_on_the_same_sides(store, clock):
    pairs(store, 9, lease_seconds=60)
    ann = person(store, "ann")
    shown = assignment.next_item(store, ann, "p")
    clock.pass_by(3600)
    assert assignment.next_item(store, ann, "p") == shown
    assert assignment.next_item(store, person(store, "bob"), "p").item.id != shown.item.id


def test_the_same_key_counts_once_and_another_answer_under_it_is_refused(store):
    pairs(store)
    ann, bob = person(store, "ann"), person(store, "bob")
    shown = assignment.next_item(store, ann, "p")
    assert vote(store, ann, shown, "key") == vote(store, ann, shown, "key")
    assert len(standing(store)) == 1
    with pytest.raises(ConflictError, match="with another answer"):
        vote(store, ann, shown, "key", TIE)
    with pytest.raises(ConflictError, match="voted on this item already"):
        vote(store, ann, shown, "other-key")
    with pytest.raises(NotAllowedError, match="another annotator's vote"):
        vote(store, bob, shown, "key")


def test_an_item_of_another_annotator_is_refused(store):
    pairs(store)
    ann, bob = person(store, "ann"), person(store, "bob")
    shown = assignment.next_item(store, ann, "p")
    for act in (
        lambda: vote(store, bob, shown, "k"),
        lambda: assignment.skip_item(store, bob, shown.item.id, "no"),
        lambda: assignment.flag_item(store, bob, shown.item.id, "no"),
        lambda: assignment.held_item(store, bob, shown.item.id),
    ):
        with pytest.raises(NotAllowedError, match="not given to you"):
            act()
    assert not standing(store)


def test_a_value_of_the_wrong_kind_is_refused(store):
    pairs(store)
    ann = person(store, "ann")
    shown = assignment.next_item(store, ann, "p")
    with pytest.raises(InputError, match="takes a choice, found Label"):
        vote(store, ann, shown, "k", Label(good=True))
    assert not standing(store)


def test_undo_gives_the_same_item_again_and_the_vote_no_longer_counts(store):
    pairs(store, 3)
    ann = person(store, "ann")
    first = assignment.next_item(store, ann, "p")
    vote(store, ann, first, "k1")
    assignment.next_item(store, ann, "p")
    assert assignment.undo(store, ann, "p") == first.item.id
    assert not standing(store)
    again = assignment.next_item(store, ann, "p")
    assert (again.item, again.sides) == (first.item, first.sides)
    vote(store, ann, again, "k2", TIE)
    with pytest.raises(KeyUsedError, match="taken back"):  # a late copy of the vote that was undone
        vote(store, ann, again, "k1")
    assert [row.id for row in standing(store)] == ["k2"]


def test_undo_goes_back_through_votes_skips_and_flags_in_their_order(store):
    pairs(store, 4)
    ann = person(store, "ann")
    seen = []
    for act in ("vote", "skip", "flag"):
        shown = assignment.next_item(store, ann, "p")
        seen.append(shown.item.id)
        if act == "vote":
            vote(store, ann, shown, "k")
        else:
            getattr(assignment, f"{act}_item")(store, ann, shown.item.id, "because")
    assert len(set(seen)) == 3
    assert [assignment.undo(store, ann, "p") for _ in seen] == seen[::-1]
    with pytest.raises(ConflictError, match="nothing to undo"):
        assignment.undo(store, ann, "p")
    assert assignment.next_item(store, ann, "p").item.id == seen[0]


def test_an_undo_or_a_reason_that_comes_twice_counts_once(store):
    pairs(store, 4)
    ann = person(store, "ann")
    for key in ("k1", "k2"):
        vote(store, ann, assignment.next_item(store, ann, "p"), key)
    last = assignment.progress(store, ann, "p").last_act
    assert assignment.undo(store, ann, "p", last) == "p-1"
    assert assignment.undo(store, ann, "p", last) is None
    assert [row.id for row in standing(store)] == ["k1"]
    first = assignment.progress(store, ann, "p").last_act
    for act in (assignment.skip_item, assignment.flag_item):
        item = assignment.next_item(store, ann, "p").item.id
        before = len(store.events())
        for _ in range(2):
            act(store, ann, item, "because")
        assert len(store.events()) == before + 1
        with pytest.raises(NotAllowedError):
            act(store, ann, item, "another reason")
    with pytest.raises(ConflictError, match="something else since"):
        assignment.undo(store, ann, "p", first)
    assert [row.id for row in standing(store)] == ["k1"]


def test_a_flagged_item_waits_for_a_manager_and_a_skipped_one_goes_to_others(store):
    pairs(store, 2)
    ann, bob = person(store, "ann"), person(store, "bob")
    flagged = assignment.next_item(store, ann, "p").item.id
    assignment.flag_item(store, ann, flagged, "a phone number")
    skipped = assignment.next_item(store, ann, "p").item.id
    assignment.skip_item(store, ann, skipped, "not my field")
    assert assignment.next_item(store, ann, "p") is None
    assert assignment.next_item(store, bob, "p").item.id == skipped
    assignment.clear_flag(store, "system", flagged)
    assert assignment.next_item(store, ann, "p").item.id == flagged


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (1.0, 40, 40), (0.5, 8, 32)])
def test_overlapping_items_get_as_many_votes_as_the_project_wants(store, share, least, most):
    pairs(store, 40, overlap_votes=3, overlap_share=share)
    people = [person(store, name) for name in ("ann", "bob", "cem", "dia")]
    for number in range(200):
        who = people[number % 4]
        shown = assignment.next_item(store, who, "p")
        if shown:
            vote(store, who, shown, f"k{number}")
    counted = Counter(row.item for row in standing(store))
    assert len(counted) == 40
    assert set(counted.values()) <= {1, 3}
    assert least <= sum(count == 3 for count in counted.values()) <= most


def test_votes_of_an_excluded_annotator_are_kept_and_their_items_open_again(store):
    pairs(store, 1)
    ann, bob = person(store, "ann"), person(store, "bob")
    vote(store, ann, assignment.next_item(store, ann, "p"), "k")
    assert assignment.next_item(store, bob, "p") is None
    accounts.change_annotator(store, "system", ann.id, excluded=True)
    assert assignment.next_item(store, bob, "p") is not None
    assert len(standing(store)) == 1
    accounts.change_annotator(store, "system", ann.id, excluded=False)
    with store.read() as connection:
        assert connection.scalar(select(items.c.votes)) == 1


def test_gold_items_come_at_their_share_and_to_everybody(store):
    pairs(store, 400, gold=100, gold_share=0.2)
    golden = Counter()
    for name in ("ann", "bob"):
        who = person(store, name)
        for number in range(150):
            shown = assignment.next_item(store, who, "p")
            golden[name] += shown.item.gold is not None
            vote(store, who, shown, f"{name}-{number}")
    assert all(15 <= count <= 45 for count in golden.values()), golden  # 30 expected, 3 sigma is 15


def test_sides_are_even_and_stored_with_the_vote(store):
    pairs(store, 200)
    ann = person(store, "ann")
    first = Counter()
    for number in range(200):
        shown = assignment.next_item(store, ann, "p")
        first[shown.sides] += 1
        assert vote(store, ann, shown, f"k{number}").sides == shown.sides
    assert set(first) == {(0, 1), (1, 0)}
    assert 70 <= first[(0, 1)] <= 130  # 100 expected, 4 sigma is 28


def test_seconds_are_never_more_than_passed_since_the_item_was_given(store, clock):
    pairs(store, 2)
    ann = person(store, "ann")
    shown = assignment.next_item(store, ann, "p")
    clock.pass_by(5)
    assert assignment.cast_vote(store, ann, shown.item.id, "k", A, 1e9).seconds == 5.0


def test_a_chat_needs_a_turn_before_the_vote_and_a_turn_sent_twice_is_one(store):
    project = Project(id="c", name="Chat", kind="chat")
    row = Item(id="c-1", project="c", kind="chat", responses=[{"policy": "x"}, {"policy": "y"}])
    create_project(store, "system", project, [row])
    ann = person(store, "ann")
    shown = assignment.next_item(store, ann, "c")
    with pytest.raises(InputError, match="talk to the two"):
        vote(store, ann, shown, "k")
    for _ in range(2):
        assignment.add_turn(store, ann, "c-1", "t1", "hello", ("x: hello", "y: hello"))
    assert len(assignment.next_item(store, ann, "c").turns) == 1
    vote(store, ann, shown, "k")


def test_many_threads_never_give_an_item_to_two_nor_lose_a_vote(store):
    pairs(store, 60)
    people = [person(store, f"person {n}") for n in range(8)]

    def work(who):
        done = []
        while shown := assignment.next_item(store, who, "p"):
            vote(store, who, shown, f"{who.id}-{shown.item.id}")
            done.append(shown.item.id)
        return done

    with ThreadPoolExecutor(8) as pool:
        done = [item for each in pool.map(work, people) for item in each]
    assert sorted(done) == sorted(set(done))
    assert len(done) == 60
    assert sorted(row.item for row in standing(store)) == sorted(done)
