"""Answers as server-sent events: OpenAI's chunks, one piece of text each."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from rlhf_core.chat_form import usage
from serving.answering import Answering
from serving.errors import ApiError
from serving.service import Recorder

DONE = "data: [DONE]\n\n"
STALLED_SECONDS = 30.0
log = logging.getLogger(__name__)


def marks(answering: Answering) -> dict[str, str]:
    """Headers that say who answers."""
    return {"X-Model-Version": answering.live.version.label, "X-Request-Id": answering.id}


def event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


class EventStream(StreamingResponse):
    """The pieces as they come. However this ends, also with a client that goes away, slots are freed."""

    def __init__(self, answering: Answering, recorder: Recorder | None) -> None:
        headers = marks(answering) | {"X-Accel-Buffering": "no"}
        super().__init__(_events(answering, recorder), media_type="text/event-stream", headers=headers)
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            await asyncio.wait_for(send(message), STALLED_SECONDS)

        try:
            await super().__call__(scope, receive, sending)
        except TimeoutError:  # it would hold its version for ever
            log.warning("a client did not read its answer for %.0f s, and was left", STALLED_SECONDS)
        finally:
            self._answering.close()


async def _events(answering: Answering, recorder: Recorder | None) -> AsyncIterator[str]:
    chunks = _Chunks(answering)
    try:
        for choice in range(answering.wanted.copies):
            yield chunks.delta(choice, {"role": "assistant", "content": ""})
        async for piece in answering.pieces():
            if piece.text:
                yield chunks.delta(piece.choice, {"content": piece.text})
    except ApiError as error:
        yield event(error.body())
        return
    wanted, choices, kept = answering.wanted, answering.choices(), {}
    if recorder and wanted.consent:
        # Before the stream ends, so that whoever has the whole answer can rate it.
        stored = await recorder.keep(answering.id, wanted, choices, answering.live.version)
        kept = {"feedback": {"stored": stored}}
    for index, ended in enumerate(choices):
        yield chunks.delta(index, {}, ended.finish_reason, **kept)
    if wanted.with_usage:
        total = usage(answering.prompt_tokens, sum(ended.tokens for ended in choices))
        yield chunks.chunk([], usage=total)
    yield DONE


class _Chunks:
    def __init__(self, answering: Answering) -> None:
        version = answering.live.version
        self._same = {
            "id": answering.id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": version.name,
            "system_fingerprint": version.label,
        }
        # Where usage is asked for, every chunk has the key.
        self._more = {"usage": None} if answering.wanted.with_usage else {}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return event(self._same | {"choices": choices} | self._more | more)

    def delta(self, choice: int, delta: dict[str, str], finish: str | None = None, **more: Any) -> str:
        return self.chunk([{"index": choice, "delta": delta, "finish_reason": finish}], **more)
