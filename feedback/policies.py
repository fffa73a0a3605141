"""Policies to talk to in a blind chat: an interface, an echo for tests, an endpoint, a function."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from feedback.errors import FeedbackError, InputError
from feedback.records import Message

REPLY_SECONDS = 120.0
MOST_REPLY = 50_000


class PolicyError(FeedbackError):
    """A policy did not answer."""


class ChatPolicy(Protocol):
    def reply(self, messages: Sequence[Message]) -> str:
        """The answer to a conversation that ends with the user's turn. May raise anything."""


class EchoPolicy:
    """Says what it was told, with a word before it."""

    def __init__(self, word: str = "You said") -> None:
        self._word = word

    def reply(self, messages: Sequence[Message]) -> str:
        return f"{self._word}: {messages[-1].content}"


class FunctionPolicy:
    """`function(messages)` with messages as dictionaries of role and content."""

    def __init__(self, function: Callable[[list[dict[str, str]]], str]) -> None:
        self._function = function

    def reply(self, messages: Sequence[Message]) -> str:
        return self._function([message.model_dump() for message in messages])


class EndpointPolicy:
    """A chat endpoint: OpenAI's `.../chat/completions`, or MLflow's `.../invocations`, which is alike."""

    def __init__(self, url: str, model: str = "", headers: Mapping[str, str] | None = None) -> None:
        self._url, self._model, self._headers = url, model, dict(headers or {})

    def reply(self, messages: Sequence[Message]) -> str:
        import httpx

        body: dict[str, object] = {"messages": [message.model_dump() for message in messages]}
        if self._model:
            body["model"] = self._model
        answer = httpx.post(self._url, json=body, headers=self._headers, timeout=REPLY_SECONDS)
        answer.raise_for_status()
        return answer.json()["choices"][0]["message"]["content"]


def make_policy(target: str) -> ChatPolicy:
    """`echo`, `echo:WORD`, the URL of an endpoint, or `module:function`. Raises InputError."""
    if target == "echo" or target.startswith("echo:"):
        return EchoPolicy(*filter(None, [target.partition(":")[2]]))
    if target.startswith(("http://", "https://")):
        return EndpointPolicy(target)
    module, _, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"policy {target!r}: not echo, a URL or module:function ({error})") from None
    return FunctionPolicy(function)


def ask_both(policies: Sequence[ChatPolicy], conversations: Sequence[Sequence[Message]]) -> tuple[str, ...]:
    """Each policy's reply to its own conversation, asked at the same time.

    Raises PolicyError, which does not say which of them failed: the chat is blind.
    """
    with ThreadPoolExecutor(len(policies)) as pool:
        waiting = [pool.submit(p.reply, c) for p, c in zip(policies, conversations, strict=True)]
        try:
            replies = tuple(str(one.result(REPLY_SECONDS + 5)) for one in waiting)
        except Exception as error:
            raise PolicyError("one of the two did not answer; send your message again") from error
    return tuple(reply[:MOST_REPLY] for reply in replies)
