"""Which run of a schedule works; two weeks of one with runs that are missed, late, empty and overlapping."""

from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import pytest
from prefect.server.schemas.schedules import CronSchedule

from tasks.schedule import DONE, FAILED, GONE, RUNNING, SCHEDULED, SKIPPED, Slot, covered_by

START = datetime(2026, 11, 2, tzinfo=UTC)  # a Monday


def at(hours):
    return START + timedelta(hours=hours)


def slot(run, due, began=None, state=RUNNING, **options):
    return Slot(run, at(due), None if began is None else at(began), state, **options)


@pytest.mark.parametrize(
    ("own", "other", "covered"),
    [
        # Both were missed and the other began first, after this one was due: it has read everything.
        (slot("b", 2, 10.1), slot("a", 1, 10, DONE), True),
        (slot("b", 2, 10.1), slot("a", 1, 10, RUNNING), True),
        (slot("b", 2, 10.1), slot("a", 1, 10, FAILED), True),
        # What was killed or cancelled, or waits, has done nothing.
        (slot("b", 2, 10.1), slot("a", 1, 10, GONE), False),
        (slot("b", 2, 10.1), slot("a", 1, None, SCHEDULED), False),
        (slot("b", 2, 10.1), slot("a", 1, 10, SKIPPED), False),
        # The other began before this one was due: votes may have come since.
        (slot("b", 2, 3), slot("a", 1, 1, DONE), False),
        (slot("b", 2, 3), slot("a", 1, 2, DONE), True),
        # A run that a person asked for looks by itself.
        (slot("b", 2, 10.1, by_itself=False), slot("a", 1, 10, DONE), False),
        # It covers others all the same.
        (slot("b", 2, 10.1), slot("a", 1, 10, DONE, by_itself=False), True),
        # One that began later does not cover: else two could wait for each other.
        (slot("a", 1, 10), slot("b", 2, 10.1, DONE), False),
    ],
)
def test_one_run_against_another(own, other, covered):
    assert (covered_by(own, [own, other]) == other) is covered


def test_of_runs_that_began_at_once_exactly_one_works():
    together = [slot(name, due, 10) for name, due in (("c", 1), ("a", 3), ("b", 2))]
    assert [one.run for one in together if covered_by(one, together) is None] == ["a"]


@dataclass
class World:
    """A deployment with one place (ENQUEUE), a worker that is away at times, and votes that come in."""

    cron: str
    away: list[tuple[float, float]]  # hours in which nothing can begin
    votes: list[float]  # hours
    hours: float  # that a training takes
    min_votes: int
    ready: list[float] = field(default_factory=list)  # hours at which a collection was done
    zone: str = "UTC"
    days: int = 14

    def slots(self):
        """When Prefect's own scheduler would start a run, and the events."""
        schedule = CronSchedule(cron=self.cron, timezone=self.zone)
        end = START + timedelta(days=self.days) - timedelta(seconds=1)
        dues = asyncio.run(schedule.get_dates(n=1000, start=START, end=end))
        found = [
            Slot(f"cron-{i:03d}", datetime.fromtimestamp(due.timestamp(), UTC)) for i, due in enumerate(dues)
        ]
        found += [Slot(f"event-{i}", at(hour)) for i, hour in enumerate(self.ready)]
        return sorted(found, key=lambda one: (one.due, one.run))

    def is_away(self, moment):
        return any(at(start) <= moment < at(end) for start, end in self.away)

    def run(self):
        """Every slot with what it did: covered, empty or trained; the clock is ours."""
        clock, runs, said, used, busy = START, [], [], 0, []
        for own in self.slots():
            clock = max(clock, own.due)  # ENQUEUE: not before the one before it has ended
            while self.is_away(clock):
                clock += timedelta(minutes=10)
            own = replace(own, began=clock, state=RUNNING)
            cover = covered_by(own, runs)
            seen = [hour for hour in self.votes if at(hour) <= clock]
            if cover is not None:
                what, took = "covered", 0.01
            elif len(seen) - used < self.min_votes:
                what, took = "empty", 0.02
            else:
                what, took = "trained", self.hours
                used = len(seen)
            busy.append((clock, clock + timedelta(hours=took)))
            clock += timedelta(hours=took)
            runs.append(replace(own, state=SKIPPED if what == "covered" else DONE))
            said.append((own, what, used, len(seen)))
        assert all(one[1] <= two[0] for one, two in itertools.pairwise(busy)), "two at once"
        return said


def test_missed_slots_run_once_when_the_worker_is_back():
    # Every three hours; away from hour 5 to 29, so the slots at 6, 9, ..., 27 are missed: eight of them.
    world = World("0 */3 * * *", [(5, 29)], [h / 10 for h in range(3360)], hours=1, min_votes=10)
    said = world.run()
    missed = [(own, done) for own, done, *_ in said if at(5) <= own.due < at(29)]
    assert [done for _, done in missed] == ["trained"] + ["covered"] * 7
    assert missed[0][0].began == at(29)


def test_a_slot_that_comes_while_another_runs_waits_and_then_looks_by_itself():
    # Hourly, five hours of training: the slots due meanwhile wait; of those only the first looks again.
    world = World("0 * * * *", [], [h / 10 for h in range(200)], hours=4.5, min_votes=10, days=1)
    said = world.run()
    assert [done for _, done, *_ in said][:8] == [
        "empty",  # hour 0: no votes yet
        "trained",  # hour 1 to 5.5
        "trained",  # due at 2, began at 5.5, after it was due: takes all votes up to there, ends at 10
        "covered",
        "covered",
        "covered",  # due at 3, 4, 5: the run that began at 5.5 has read all that was there
        "trained",  # due at 6, began at 10
        "covered",
    ]


def test_empty_slots_say_so_and_votes_are_kept_for_the_next():
    world = World("0 3 * * *", [], [24.0 * day + 1 for day in range(14)], hours=1, min_votes=3)
    said = world.run()
    assert [done for _, done, *_ in said] == (["empty", "empty", "trained"] * 5)[:14]
    assert [used for _, done, used, _ in said if done == "trained"] == [3, 6, 9, 12]


def test_an_event_and_a_slot_at_the_same_time_train_once():
    world = World("0 12 * * *", [], [h / 2 for h in range(28 * 24)], hours=1, min_votes=5, ready=[12.0, 36.0])
    said = world.run()
    for day in (0, 1):
        both = [done for own, done, *_ in said if own.due == at(12 + 24 * day)]
        assert sorted(both) == ["covered", "trained"]


@pytest.mark.parametrize("seed", range(20))
def test_two_weeks_lose_no_vote_and_never_train_twice_on_the_same(seed):
    rng = random.Random(seed)
    starts = sorted(rng.uniform(0, 330) for _ in range(rng.randrange(4)))
    world = World(
        cron=rng.choice(["0 */4 * * *", "30 2 * * *", "15 */1 * * *", "0 6,18 * * 1-5"]),
        away=[(start, start + rng.choice([0.5, 6, 30])) for start in starts],
        votes=sorted(rng.uniform(0, 336) for _ in range(rng.choice([0, 5, 60, 600]))),
        hours=rng.choice([0.3, 2.0, 7.0]),
        min_votes=rng.choice([1, 5, 50]),
        ready=sorted(rng.uniform(0, 336) for _ in range(rng.randrange(4))),
        zone=rng.choice(["UTC", "Europe/Berlin", "America/New_York"]),
    )
    said = world.run()
    assert len(said) == len(world.slots()), "every slot ends, and says what it did"
    used = [use for _, done, use, _ in said if done == "trained"]
    assert used == sorted(set(used)), "each training has votes that the one before had not"
    assert all(own.began >= own.due for own, *_ in said)
    # What is left over is less than a training asks for, or came after the last slot had begun.
    last_look = max((own.began for own, done, *_ in said if done != "covered"), default=START)
    seen = sum(at(hour) <= last_look for hour in world.votes)
    assert seen - (used[-1] if used else 0) < world.min_votes
