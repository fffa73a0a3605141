"""Which versions should answer, by the registry's aliases, and the way there without a gap.

One thread looks at the aliases every `interval` seconds. It loads a new version while the old one answers,
switches, and frees the old one when its last request has ended. There are never more than `MOST_MODELS` in
memory: where the champion and a challenger are two already, the challenger makes room while a new champion
comes, and its share goes to the champion meanwhile. What cannot be loaded is tried again, ever more rarely,
and the old version goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any, Protocol

from rlhf_core.errors import RLHFError
from serving.fleet import CHALLENGER, CHAMPION, Fleet
from serving.models import Live, Version

MOST_MODELS = 2
LONGEST_PAUSE = 300.0  # seconds between two tries of a version that does not load
log = logging.getLogger(__name__)


class Source(Protocol):
    """Where versions come from."""

    def wanted(self) -> dict[str, Version]:
        """The version of each role, the champion first. Raises RLHFError when that is not known now."""

    def load(self, version: Version) -> Live:
        """May raise anything when it cannot be loaded."""


@dataclass
class Fault:
    """A version that did not load."""

    message: str
    tries: int
    next_try: float  # by time.monotonic()


class Stopped(Exception):
    """The watcher was stopped while it waited."""


class Watcher:
    """Keeps a fleet at what its source wants."""

    def __init__(self, fleet: Fleet, source: Source, interval: float) -> None:
        self._fleet, self._source, self._interval = fleet, source, interval
        self._faults: dict[Version, Fault] = {}
        self._source_fault = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Load what is wanted, then watch. Raises RLHFError when no champion can be loaded."""
        wanted = self._source.wanted()
        self._reach(wanted)
        if self._fleet.role(CHAMPION) is None:
            raise RLHFError(self._faults[wanted[CHAMPION]].message)
        self._thread = threading.Thread(target=self._work, name="watcher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def state(self) -> dict[str, Any]:
        """For /healthz: what does not load, and whether the registry can be read."""
        faults = {version.label: fault.message for version, fault in list(self._faults.items())}
        return {"registry": self._source_fault or "ok", "not_loaded": faults}

    def _work(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self.look()
            except Stopped:
                return
            except Exception:  # the old versions go on, and the next look may do better
                log.exception("looking at the registry failed")

    def look(self) -> None:
        """Ask the source once, and go where it says."""
        try:
            wanted = self._source.wanted()
        except RLHFError as error:
            if not self._source_fault:
                log.warning("the registry does not answer; what is loaded goes on: %s", error)
            self._source_fault = str(error)
            return
        if self._source_fault:
            log.info("the registry answers again")
        self._source_fault = ""
        self._reach(wanted)

    def _reach(self, wanted: dict[str, Version]) -> None:
        for version in [version for version in self._faults if version not in wanted.values()]:
            del self._faults[version]
        for role in (CHAMPION, CHALLENGER):
            self._settle(role, wanted.get(role))
        self._fleet.close_unused()

    def _settle(self, role: str, version: Version | None) -> None:
        """Give the role to `version`; it stays where it is when that one does not load."""
        before = self._fleet.role(role)
        if version == (before.version if before else None):
            return
        if version is None:
            self._switch(role, None)
            return
        live = self._fleet.find(version) or self._load(role, version)
        if live is not None:
            self._switch(role, live)

    def _switch(self, role: str, live: Live | None) -> None:
        before = self._fleet.role(role)
        self._fleet.put(role, live)
        now = live.version.label if live else "nobody"
        log.info("%s: %s answers%s", role, now, f", in place of {before.version.label}" if before else "")

    def _load(self, role: str, version: Version) -> Live | None:
        fault = self._faults.get(version)
        if fault is not None and time.monotonic() < fault.next_try:
            return None
        try:
            self._make_room(role)
            live = self._source.load(version)
        except Stopped:
            raise
        except Exception as error:  # whatever is wrong with a version, what answers goes on
            tries = fault.tries + 1 if fault else 1
            pause = min(self._interval * 2**tries, LONGEST_PAUSE)
            self._faults[version] = Fault(str(error) or repr(error), tries, time.monotonic() + pause)
            now = self._fleet.role(role)
            stays = f"{now.version.label} stays" if now else "nobody is"
            log.error("%s does not load, %s %s: %s", version.label, stays, role, error)
            return None
        self._faults.pop(version, None)
        return live

    def _make_room(self, role: str) -> None:
        """Wait until one more model may be loaded; the challenger goes where that takes it.

        Raises Stopped.
        """
        self._fleet.close_unused()
        champion, challenger = self._fleet.role(CHAMPION), self._fleet.role(CHALLENGER)
        two = challenger is not None and challenger is not champion
        if two and (role == CHALLENGER or self._fleet.count_loaded() >= MOST_MODELS):
            self._switch(CHALLENGER, None)
        while self._fleet.count_loaded() >= MOST_MODELS:
            self._fleet.close_unused(timeout=0.5)
            if self._stop.is_set():
                raise Stopped
