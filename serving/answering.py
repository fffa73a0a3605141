"""One request while it is answered: its hold on a version, its order, and the pieces that come back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from rlhf_core.chat_form import Choice, new_id
from serving.batch import Failure, Order, Piece
from serving.errors import ApiError, bad
from serving.fleet import Fleet
from serving.models import Live
from serving.requests import Wanted


class Gone(Exception):
    """The client went away."""


class Answering:
    """Holds a version from `open` to `close`, which must be called."""

    def __init__(self, fleet: Fleet, live: Live, wanted: Wanted) -> None:
        self._fleet, self.live, self.wanted = fleet, live, wanted
        self.id, self.prompt_tokens = new_id(), 0
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Piece | Failure] = asyncio.Queue()
        self._order: Order | None = None
        self._closed = False
        self._texts = [""] * wanted.copies
        self._ends: dict[int, Piece] = {}

    @classmethod
    async def open(cls, fleet: Fleet, wanted: Wanted) -> Answering:
        """Take a version and put the order into its queue. Raises ApiError."""
        found = cls(fleet, fleet.acquire(wanted.model, wanted.conversation), wanted)
        try:
            await run_in_threadpool(found._begin)
        except BaseException:
            found.close()
            raise
        return found

    def _begin(self) -> None:
        prompt = self.live.encode(self.wanted.messages)
        self.prompt_tokens = len(prompt)
        self.wanted = wanted = _fitted(self.wanted, len(prompt), self.live.context)
        self._order = Order(prompt, wanted.sampling, wanted.copies, wanted.stops, self._sink)
        self.live.engine.submit(self._order)

    def _sink(self, event: Piece | Failure) -> None:
        """Called from the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop has ended, so nobody waits
            if self._order is not None:
                self._order.cancel()

    async def pieces(self) -> AsyncIterator[Piece]:
        """Until every choice has ended. Raises ApiError 503 when the model fails or the server stops."""
        while len(self._ends) < self.wanted.copies:
            event = await self._events.get()
            if isinstance(event, Failure):
                raise ApiError(503, event.message, code="not_answered")
            self._texts[event.choice] += event.text
            if event.finish:
                self._ends[event.choice] = event
            yield event

    def choices(self) -> list[Choice]:
        """All choices, when they have ended."""
        ends = [self._ends[choice] for choice in range(self.wanted.copies)]
        return [Choice(text, end.finish, end.tokens) for text, end in zip(self._texts, ends, strict=True)]

    @contextlib.asynccontextmanager
    async def while_asked(self, request: Request) -> AsyncIterator[None]:
        """End the block with Gone as soon as the client goes away."""
        task = asyncio.current_task()
        assert task is not None
        gone = False

        async def watch() -> None:
            nonlocal gone
            while (await request.receive())["type"] != "http.disconnect":
                pass
            gone = True
            task.cancel()

        watcher = asyncio.create_task(watch())
        try:
            yield
        except asyncio.CancelledError:
            if gone and task.uncancel() == 0:
                raise Gone from None
            raise
        finally:
            watcher.cancel()

    def close(self) -> None:
        """Free the slots, if the answer is not whole, and the version."""
        if self._closed:
            return
        self._closed = True
        if self._order is not None:
            self._order.cancel()
        self._fleet.release(self.live)


def _fitted(wanted: Wanted, prompt: int, context: int) -> Wanted:
    """The request with an answer that fits behind its prompt. Raises ApiError when that is too short."""
    tokens, left = wanted.sampling.max_new_tokens, context - prompt
    least = tokens if wanted.says_length else 1
    if tokens <= left:
        return wanted
    if left > 0 and not wanted.says_length:
        return replace(wanted, sampling=wanted.sampling.model_copy(update={"max_new_tokens": left}))
    raise bad(
        "messages",
        f"{prompt} tokens, with {least} of the answer, must be at most {context}",
        "context_length_exceeded",
    )
