"""Programs that use the annotation service as people's browsers do, many at once, and what must hold after.

They sign in, read, pause, vote and take back over HTTP; what got no answer is sent again with its key.
`faults` reads the store afterwards: no vote lost, doubled or changed, no item in more hands than it needs.
"""

from __future__ import annotations

import html
import random
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from feedback.accounts import add_annotator
from feedback.projects import create_project
from feedback.records import Event, EventType, Item, Project
from feedback.store import Store, time_text

GOOD, POOR = "The good answer", "The poor answer"
PROJECT = "load"
NOT_NOW = (429, 500, 503)  # what the pages send again


@dataclass(frozen=True)
class Habits:
    """How annotators work."""

    pause: float = 2.0  # mean seconds with an item, drawn evenly from 0 to twice that
    resend: float = 0.05  # share of votes sent twice, as when the first answer was lost
    undo: float = 0.02  # share of votes taken back


@dataclass
class Outcome:
    """What the service acknowledged, and how long it took."""

    votes: dict[str, str] = field(default_factory=dict)  # key: item, of votes that must stand
    undone: set[str] = field(default_factory=set)  # keys of votes that must not
    unsure: set[str] = field(default_factory=set)  # keys whose last request got no answer
    vote_seconds: list[float] = field(default_factory=list)
    page_seconds: list[float] = field(default_factory=list)
    retries: Counter[str] = field(default_factory=Counter)  # by status, or "no answer"
    lock: threading.Lock = field(default_factory=threading.Lock)


class Client:
    """One annotator, who prefers the good answer wherever it stands."""

    def __init__(self, url: str, number: int, habits: Habits, outcome: Outcome, end: threading.Event) -> None:
        self.habits, self.outcome, self.end = habits, outcome, end
        self.draw = random.Random(number)
        # An address of its own, as behind a proxy: rates are counted as for as many machines.
        address = {"X-Forwarded-For": f"10.0.{number // 250}.{number % 250 + 1}"}
        self.http = httpx.Client(base_url=url, timeout=30.0, headers=address)
        self.name = name_of(number)

    def work(self) -> None:
        """Vote until `end` is set or nothing is left."""
        with self.http:
            try:
                self._send("POST", "/login", {"name": self.name, "secret": secret_of(self.name)}, 303)
                while self._one():
                    pass
            except TimeoutError:
                assert self.end.is_set(), "gave up too early"

    def _one(self) -> bool:
        """Take an item and vote on it; False when there is no more to do."""
        text = self._send("GET", f"/p/{PROJECT}", None, 200, self.outcome.page_seconds).text
        form = fields_of(text)
        if form is None or self.end.wait(self.draw.uniform(0.0, 2.0 * self.habits.pause)):
            return False
        form["choice"] = "0:2" if text.index(GOOD) < text.index(POOR) else "1:2"
        self._vote(form)
        if self.draw.random() < self.habits.undo:
            self._take_back(form)
        return True

    def _vote(self, form: dict[str, str]) -> None:
        """A key stands under `unsure` while its request is on the way."""
        with self.outcome.lock:
            self.outcome.unsure.add(form["key"])
        for _ in range(2 if self.draw.random() < self.habits.resend else 1):
            self._send("POST", f"/p/{PROJECT}/vote", form, 200, self.outcome.vote_seconds)
            with self.outcome.lock:
                self.outcome.unsure.discard(form["key"])
                self.outcome.votes[form["key"]] = form["item"]

    def _take_back(self, form: dict[str, str]) -> None:
        """Once: an undo that got no answer may have been done, and a second one would undo another vote."""
        with self.outcome.lock:
            del self.outcome.votes[form["key"]]
            self.outcome.unsure.add(form["key"])
        try:
            answer = self.http.post(f"/p/{PROJECT}/undo", data={"csrf": form["csrf"]})
        except httpx.TransportError:
            return
        if answer.status_code == 303:
            with self.outcome.lock:
                self.outcome.unsure.discard(form["key"])
                self.outcome.undone.add(form["key"])

    def _send(
        self,
        method: str,
        path: str,
        data: dict[str, str] | None,
        expected: int,
        seconds: list[float] | None = None,
    ) -> httpx.Response:
        """The answer, tried again as the page does; TimeoutError when there is none and `end` is set."""
        headers = {"Accept": "application/json"} if path.endswith("/vote") else None
        while True:
            began, last = time.perf_counter(), self.end.is_set()
            try:
                answer = self.http.request(method, path, data=data, headers=headers)
                reason = str(answer.status_code)
            except httpx.TransportError:
                reason = "no answer"
            taken = time.perf_counter() - began
            with self.outcome.lock:
                if reason == str(expected) and seconds is not None:
                    seconds.append(taken)
                if reason != str(expected):
                    self.outcome.retries[reason] += 1
            if reason == str(expected):
                return answer
            assert reason == "no answer" or answer.status_code in NOT_NOW, f"{path}: {reason}: {answer.text}"
            if last:
                raise TimeoutError(path)
            time.sleep(0.2)


class Annotators:
    """Clients at work, each in a thread."""

    def __init__(self, url: str, count: int, habits: Habits) -> None:
        self.outcome, self._end = Outcome(), threading.Event()
        self._pool = ThreadPoolExecutor(count)
        clients = [Client(url, number, habits, self.outcome, self._end) for number in range(count)]
        self._working: list[Future[None]] = [self._pool.submit(client.work) for client in clients]

    def wait_for_votes(self, more: int, seconds: float = 120.0) -> None:
        """Until so many more votes were acknowledged. Raises what a client raised, or TimeoutError."""
        until, wanted = time.monotonic() + seconds, len(self.outcome.vote_seconds) + more
        while len(self.outcome.vote_seconds) < wanted:
            for one in self._working:
                if one.done():
                    one.result()
            if time.monotonic() > until:
                raise TimeoutError(f"{len(self.outcome.vote_seconds)} of {wanted} votes")
            time.sleep(0.02)

    def acknowledged(self) -> set[str]:
        with self.outcome.lock:
            return set(self.outcome.votes)

    def finish(self, *, all_items: bool = False) -> Outcome:
        """Let everybody end, at once or when nothing is left. Raises what a client raised."""
        if not all_items:
            self._end.set()
        for one in self._working:
            one.result()
        self._pool.shutdown()
        return self.outcome


def name_of(number: int) -> str:
    return f"person {number}"


def secret_of(name: str) -> str:
    return f"secret of {name}"


def fields_of(text: str) -> dict[str, str] | None:
    """The hidden fields of a page's vote, None where it has none."""
    form = re.search(r'<form id="vote".*?</form>', text, re.S)
    if form is None:
        return None
    found = re.findall(r'type="hidden" name="([^"]+)" value="([^"]*)"', form.group(0))
    return {name: html.unescape(value) for name, value in found}


def prepare(database: Path, num_people: int, num_items: int, **rules: object) -> None:
    """A store with accounts and pairs; answer `a` is the good one."""
    store = Store(database)
    project = Project.model_validate({"id": PROJECT, "name": "Load", "kind": "pairwise", **rules})
    rows = [
        Item.model_validate(
            {
                "id": f"i{number:06d}",
                "project": PROJECT,
                "kind": "pairwise",
                "messages": [{"role": "user", "content": f"Question {number}"}],
                "responses": [{"text": f"{text} {number}", "policy": "x"} for text in (GOOD, POOR)],
            }
        )
        for number in range(num_items)
    ]
    create_project(store, "system", project, rows)
    for number in range(num_people):
        add_annotator(store, "system", name_of(number), secret=secret_of(name_of(number)))
    store.close()


def faults(store: Store, outcome: Outcome) -> list[str]:
    """What is wrong with the store after these annotators, a sentence each; nothing is the right answer."""
    views, events = store.views(), store.events()
    needed = {row[0]: row[6] for row in views["items"]}
    cast = Counter(e.payload["vote"]["id"] for e in events if e.type is EventType.VOTE_CAST)
    standing = {row[0]: row for row in views["votes"] if not row[-1]}
    found = [
        f"vote {key} was acknowledged and is not there" for key in outcome.votes.keys() - standing.keys()
    ]
    found += [f"vote {key} was taken back and stands" for key in outcome.undone & standing.keys()]
    known = outcome.votes.keys() | outcome.unsure
    found += [f"vote {key} stands and nobody gave it" for key in standing.keys() - known]
    found += [f"vote {key} is {times} times in the log" for key, times in cast.items() if times > 1]
    pairs = Counter((row[2], row[3]) for row in standing.values())
    found += [f"{item}: {times} votes of {who}" for (item, who), times in pairs.items() if times > 1]
    found += [
        f"vote {key} is on {row[2]}, not on {outcome.votes[key]}"
        for key, row in standing.items()
        if outcome.votes.get(key, row[2]) != row[2]
    ]
    found += [
        f"vote {key} is for the poor answer"
        for key, row in standing.items()
        if row[4]["value"]["choice"] != "a"
    ]
    return found + crowded(events, needed)


def crowded(events: Iterable[Event], needed: dict[str, int]) -> list[str]:
    """The log played again: items given out though votes and others' leases were enough already.

    Who takes a vote back gets the item again, whoever voted on it late in the meantime.
    """
    found, standing = [], defaultdict(set)
    taken_back: tuple[str, str] | None = None  # item and annotator of the event before
    leases: dict[str, dict[str, str]] = defaultdict(dict)  # by item and annotator: when it ends
    for event in events:
        payload = event.payload
        who = payload.get("annotator", "")
        if event.type is EventType.ITEM_LEASED:
            item, now = payload["item"], time_text(event.at)
            others = sum(ends > now for other, ends in leases[item].items() if other != who)
            enough = len(standing[item]) + others >= needed[item] > 0
            if enough and taken_back != (item, who):
                found.append(f"event {event.number}: {item} was given to one too many")
            leases[item][who] = payload["expires"]
        elif event.type is EventType.VOTE_CAST:
            standing[payload["vote"]["item"]].add(who)
            leases[payload["vote"]["item"]].pop(who, None)
        elif event.type is EventType.VOTE_UNDONE:
            standing[payload["item"]].discard(who)
        elif event.type in (EventType.ITEM_SKIPPED, EventType.ITEM_FLAGGED, EventType.LEASE_RELEASED):
            leases[payload["item"]].pop(who, None)
        taken_back = (payload["item"], who) if event.type is EventType.VOTE_UNDONE else None
    return found
