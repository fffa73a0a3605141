"""A killed service loses nothing that it acknowledged; many annotators at once get on."""

from __future__ import annotations

import random
import time

import pytest

from benchmarks.annotators import Annotators, Habits, Outcome, crowded, faults, prepare
from benchmarks.load import percentile
from feedback.records import EventType
from feedback.store import Store
from feedback.tables import votes

from .serving import Serving, serving


def standing(database):
    store = Store(database)
    found = {row[0] for row in store.views()["votes"] if not row[-1]}
    store.close()
    return found


def check(database, outcome):
    """Nothing is wrong, and the log makes every view again."""
    store = Store(database)
    assert faults(store, outcome) == []
    before = store.views()
    store.rebuild()
    assert store.views() == before
    store.close()


@pytest.mark.parametrize(
    ("num_kills", "num_people"), [(3, 8), pytest.param(20, 50, marks=[pytest.mark.slow])]
)
def test_every_acknowledged_vote_outlives_a_kill_under_load_and_counts_once(tmp_path, num_kills, num_people):
    """The annotators go on all the while: what was on its way when the service died is sent again."""
    draw, database = random.Random(3), tmp_path / "feedback.db"
    prepare(database, num_people, 4000, overlap_votes=3, overlap_share=0.5)
    service = Serving(tmp_path)
    annotators = Annotators(service.url, num_people, Habits(pause=0.05, resend=0.1, undo=0.1))
    for _ in range(num_kills):
        annotators.wait_for_votes(2 * num_people)
        time.sleep(draw.uniform(0.0, 0.2))
        service.kill()
        acknowledged = annotators.acknowledged()
        assert len(acknowledged) > num_people
        assert acknowledged <= standing(database)
        service = Serving(tmp_path, port=service.port)
    annotators.wait_for_votes(num_people)
    outcome = annotators.finish()
    service.stop()
    assert outcome.retries["no answer"] >= num_kills
    assert len(outcome.unsure) <= num_people * (num_kills + 1)
    check(database, outcome)


def test_annotators_at_once_get_each_item_once_and_finish(tmp_path):
    database = tmp_path / "feedback.db"
    prepare(database, 12, 40, overlap_votes=3, overlap_share=0.5)
    with serving(tmp_path) as service:
        annotators = Annotators(service.url, 12, Habits(pause=0.02, resend=0.3, undo=0.2))
        outcome = annotators.finish(all_items=True)
    assert not outcome.unsure
    check(database, outcome)
    store = Store(database)
    assert all(row[7] == row[6] in (1, 3) for row in store.views()["items"])  # votes given, votes needed
    store.close()


@pytest.mark.slow
def test_fifty_annotators_for_minutes_while_leases_run_out(tmp_path, capsys):
    """Some sit over an item for longer than its lease: others get it, and the late vote counts too."""
    database = tmp_path / "feedback.db"
    prepare(database, 50, 6000, overlap_votes=3, overlap_share=0.5, lease_seconds=2)
    with serving(tmp_path) as service:
        annotators = Annotators(service.url, 50, Habits(pause=1.5, resend=0.1, undo=0.05))
        annotators.wait_for_votes(50)
        time.sleep(180)
        outcome = annotators.finish()
    check(database, outcome)
    late = [vote for vote in outcome.vote_seconds if vote > 5.0]
    assert len(late) < len(outcome.vote_seconds) / 100
    assert len(outcome.votes) > 2000
    with capsys.disabled():
        p50, p95 = (percentile(outcome.vote_seconds, share) for share in (0.5, 0.95))
        print(f"\n50 annotators, {len(outcome.votes)} votes: median {p50:.3f} s, 95 % within {p95:.3f} s")


def voted(tmp_path):
    """A store with votes, and what their client remembers of them."""
    from feedback import assignment
    from feedback.accounts import find_by_name
    from feedback.records import Choice

    prepare(tmp_path / "feedback.db", 2, 4)
    store, outcome = Store(tmp_path / "feedback.db"), Outcome()
    for number in range(4):
        who = find_by_name(store, f"person {number % 2}")
        shown = assignment.next_item(store, who, "load")
        assignment.cast_vote(store, who, shown.item.id, f"k{number}", Choice(choice="a", strength=2), 1.0)
        outcome.votes[f"k{number}"] = shown.item.id
    return store, outcome


def test_the_check_finds_what_it_looks_for(tmp_path):
    store, outcome = voted(tmp_path)
    assert faults(store, outcome) == []
    outcome.votes["lost"] = "i000000"
    outcome.undone.add("k1")
    del outcome.votes["k1"]
    first, third = outcome.votes["k0"], outcome.votes["k3"]
    outcome.votes["k0"] = third
    entry = next(e for e in store.events() if e.type is EventType.VOTE_CAST)
    with store.write() as connection:
        record = entry.payload["vote"] | {"id": "twice"}
        row = {"id": "twice", "project": "load", "item": first, "annotator": "x", "number": 999}
        value = {"kind": "choice", "choice": "b", "strength": 1}
        connection.execute(votes.insert().values(record=record | {"value": value}, **row))
    assert sorted(faults(store, outcome)) == [
        "vote k0 is on i000000, not on i000003",
        "vote k1 stands and nobody gave it",
        "vote k1 was taken back and stands",
        "vote lost was acknowledged and is not there",
        "vote twice is for the poor answer",
        "vote twice stands and nobody gave it",
    ]
    store.close()


def test_an_item_in_too_many_hands_is_found(tmp_path):
    store, _ = voted(tmp_path)
    log = store.events()
    needed = {f"i{number:06d}": 1 for number in range(4)}
    assert crowded(log, needed) == []
    leased = next(e for e in log if e.type is EventType.ITEM_LEASED)
    again = leased.model_copy(update={"payload": leased.payload | {"annotator": "another"}})
    place = log.index(leased) + 1
    assert len(crowded([*log[:place], again, *log[place:]], needed)) >= 1  # before its vote
    assert len(crowded([*log, again], needed)) == 1  # and after it
    item, who = leased.payload["item"], leased.payload["annotator"]
    cast = next(e for e in log if e.type is EventType.VOTE_CAST and e.payload["annotator"] == who)
    late = cast.model_copy(update={"payload": cast.payload | {"annotator": "another"}})
    facts = {"type": EventType.VOTE_UNDONE, "payload": {"item": item, "annotator": who}}
    taken_back = [*log, late, cast.model_copy(update=facts)]
    assert crowded([*taken_back, leased], needed) == []  # who takes a vote back gets the item all the same
    assert len(crowded([*taken_back, again], needed)) == 1
    store.close()
