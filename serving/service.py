"""What the endpoints share: the fleet, what may be asked, and where answers with consent are kept."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool

from feedback.errors import FeedbackError
from feedback.production import Rated, answer_item, keep_answers, pseudonym_of, rate
from feedback.store import Store
from rlhf_core.chat_form import Choice
from serving.fleet import Fleet
from serving.models import Version
from serving.requests import Rating, Wanted, choice_id
from serving.watch import Watcher

ANONYMOUS = "anonymous"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What one request may ask. `key`: the Bearer token that is asked for; empty: none."""

    most_tokens: int = 1024
    most_body: int = 2**20  # bytes
    slots: int = 8
    key: str = field(default="", repr=False)
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost")


class Recorder:
    """Keeps answers of users who consented, and their ratings."""

    def __init__(self, store: Store, key: bytes) -> None:
        self._store, self._key = store, key

    async def keep(self, answer: str, wanted: Wanted, choices: list[Choice], version: Version) -> bool:
        """Whether all choices are on the disk; a store that fails costs a warning, not the answer."""
        try:
            items = [
                answer_item(
                    choice_id(answer, index),
                    wanted.messages,
                    choice.text,
                    policy=version.label,
                    decoding=wanted.decoding | {"finish_reason": choice.finish_reason},
                )
                for index, choice in enumerate(choices)
            ]
            await run_in_threadpool(keep_answers, self._store, items)
        except FeedbackError as error:
            log.error("answer %s was not kept: %s", answer, error)
            return False
        except ValueError as error:  # an answer that is no item, as one of more than 100,000 characters
            log.error("answer %s was not kept: %s", answer, type(error).__name__)
            return False
        return True

    def rate(self, rating: Rating) -> Rated:
        """Raises UnknownAnswerError, ConflictError or StoreUnavailableError."""
        user = pseudonym_of(rating.user, self._key) if rating.user else ANONYMOUS
        return rate(self._store, rating.answer, user, good=rating.good, comment=rating.comment)


@dataclass
class Service:
    """A server's parts. Without a recorder nothing is ever kept."""

    fleet: Fleet
    watcher: Watcher
    limits: Limits
    recorder: Recorder | None = None

    def state(self) -> dict[str, Any]:
        """For /healthz."""
        return {
            "status": "draining" if self.fleet.draining else "ok",
            "model": self.fleet.name,
            "in_flight": self.fleet.in_flight,
            "versions": self.fleet.state(),
            "logging": "with consent" if self.recorder else "off",
        } | self.watcher.state()
