"""Which runs of a schedule still have something to do: a missed one runs once, not once per missed slot.

A slot is the time at which a run was due. What a run reads is as new as its beginning, so a run that began
at or after a slot was due has done that slot's work too. After hours in which nothing could run, all missed
slots wait; the first of them begins, and has done the work of the others, which say so and end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

SCHEDULED, RUNNING, DONE, FAILED, GONE = "scheduled", "running", "done", "failed", "gone"
SKIPPED = "skipped"  # it said that another one had done its work
COVERS = (RUNNING, DONE, FAILED)
# A failed run did meet what was there, and the next slot is the next try; one that was killed or cancelled
# counts for nothing, and neither does one that was skipped: it has looked at nothing.


@dataclass(frozen=True)
class Slot:
    """A run of the deployment, as the server knows it."""

    run: str
    due: datetime
    began: datetime | None = None
    state: str = SCHEDULED
    by_itself: bool = True  # a schedule or an event asked for it, and no person


def covered_by(own: Slot, others: Sequence[Slot]) -> Slot | None:
    """The earliest other run that began when `own` was due or later, and has done its work.

    None for a run that a person asked for: it always looks by itself. Of two runs that began at once, each in
    the other's sight, the one with the earlier time (then the smaller id) is the other's cover, so one works.
    """
    if not own.by_itself or own.began is None:
        return None
    found = [
        (other.began, other.run, other)
        for other in others
        if other.began is not None
        and other.run != own.run
        and other.state in COVERS
        and own.due <= other.began
        and (other.began, other.run) < (own.began, own.run)
    ]
    return min(found, key=lambda one: one[:2])[2] if found else None
