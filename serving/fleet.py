"""The versions that answer now: who gets a request, and when a version that was replaced may go.

A request holds the version that it began with until it is answered, so a switch of versions neither loses
nor cuts one. A version that nobody points to is closed with its last request.
"""

from __future__ import annotations

import hashlib
import threading
import time
from typing import Any

from serving.errors import ApiError, stopping
from serving.models import Live, Version

CHAMPION, CHALLENGER = "champion", "challenger"
ROUTES = 2**64


class Fleet:
    """Loaded versions by role. `name` is the model that clients ask for; the champion must be put first."""

    def __init__(self, name: str, share: float = 0.0) -> None:
        self.name, self.share = name, share
        self._roles: dict[str, Live] = {}
        self._loaded: list[Live] = []  # with those that only end their requests
        self._changed = threading.Condition()
        self.draining = False

    def acquire(self, model: str, conversation: str) -> Live:
        """The version for a request, held until `release`. The same conversation gets the same role.

        Raises ApiError: 404 for a model that is not served, 503 when the server shuts down.
        """
        with self._changed:
            if self.draining:
                raise stopping()
            live = self._roles[self._role_of(conversation)] if model in ("", self.name) else None
            live = live or next((one for one in self._roles.values() if one.version.label == model), None)
            if live is None:
                known = ", ".join(self.models())
                raise ApiError(
                    404,
                    f"model: {model[:200]!r} is not served here; there is {known}",
                    param="model",
                    code="model_not_found",
                )
            live.users += 1
            return live

    def release(self, live: Live) -> None:
        """A request is answered, or nobody waits for its answer."""
        with self._changed:
            live.users -= 1
            assert live.users >= 0
            self._changed.notify_all()

    def _role_of(self, conversation: str) -> str:
        digest = hashlib.sha256(f"share/{conversation}".encode()).digest()
        if int.from_bytes(digest[:8], "big") < self.share * ROUTES and CHALLENGER in self._roles:
            return CHALLENGER
        return CHAMPION

    def find(self, version: Version) -> Live | None:
        """That version, when it answers under some role."""
        with self._changed:
            return next((live for live in self._roles.values() if live.version == version), None)

    def put(self, role: str, live: Live | None) -> None:
        """From now on `live` has the role (None: nobody has it); the one before ends its requests."""
        with self._changed:
            if live is None:
                self._roles.pop(role, None)
            else:
                self._roles[role] = live
                if live not in self._loaded:
                    self._loaded.append(live)
            self._changed.notify_all()

    def role(self, role: str) -> Live | None:
        with self._changed:
            return self._roles.get(role)

    def count_loaded(self) -> int:
        with self._changed:
            return len(self._loaded)

    def close_unused(self, timeout: float = 0.0) -> bool:
        """Close versions without role and requests; wait so long for one. Whether one was closed."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._unused()), timeout)
            gone = self._unused()
            self._loaded = [live for live in self._loaded if live not in gone]
        for live in gone:
            live.close()
        return bool(gone)

    def _unused(self) -> list[Live]:
        named = list(self._roles.values())
        return [live for live in self._loaded if live not in named and live.users == 0]

    def models(self) -> list[str]:
        """What a client may name: the model, and each version that answers."""
        with self._changed:
            return [self.name, *dict.fromkeys(live.version.label for live in self._roles.values())]

    @property
    def in_flight(self) -> int:
        with self._changed:
            return sum(live.users for live in self._loaded)

    def drain(self, seconds: float) -> bool:
        """Refuse new requests and wait for those in flight; whether all ended in time."""
        with self._changed:
            self.draining = True
            return self._changed.wait_for(lambda: not any(live.users for live in self._loaded), seconds)

    def close(self) -> None:
        """End all engines; requests still in flight are told."""
        with self._changed:
            self.draining = True
            loaded, self._loaded, self._roles = self._loaded, [], {}
        for live in loaded:
            live.close()

    def state(self) -> list[dict[str, Any]]:
        """What is loaded, for /healthz."""
        with self._changed:
            roles = dict(self._roles)
            loaded = list(self._loaded)
        now = time.time()
        return [
            {
                "version": live.version.label,
                "roles": [role for role, one in roles.items() if one is live],
                "loaded_seconds": round(now - live.since, 1),
                "in_flight": live.users,
                "running": live.engine.running,
                "waiting": live.engine.waiting,
                "tokens": live.engine.tokens,
            }
            for live in loaded
        ]
