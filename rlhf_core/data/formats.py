"""From raw rows, plain or conversational, to rows of one form.

Plain: `prompt` with `response`, or with `chosen` and `rejected`, as texts. Conversational: `messages` (a
list of role and content; the last assistant turn is the response of a demonstration), or `prompt`, `chosen`,
`rejected` as lists of messages. CSV files may hold lists as JSON texts. Preferences may also be rankings:
`responses`, the best first, or in any order with a list of `ratings`. `probability` says how sure it is that
the chosen answer is the better one: 1 when absent, 0.5 for a tie.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import combinations
from typing import Any

from rlhf_core.data.rows import TEXTS, TIE, readable

ROLES = ("system", "user", "assistant")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u200b-\u200f\ufeff]")


class RowError(ValueError):
    """Why a row cannot be used; the text is shown to the person who owns it."""


def to_rows(values: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    """The prepared rows of one raw row: several for a ranking. Raises RowError as `to_row` does."""
    if kind == "preferences" and values.get("responses") is not None:
        return [to_row(pair, kind) for pair in pairs_of_ranking(values)]
    return [to_row(values, kind)]


def pairs_of_ranking(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every pair of a ranking, as raw rows.

    Without `ratings` the responses come best first. With them the higher is preferred, by a margin of the
    difference, and equal ones are ties. Raises RowError for a list that is not whole.
    """
    responses = _list(values["responses"], "responses")
    ratings = None if values.get("ratings") is None else _list(values["ratings"], "ratings")
    if len(responses) < 2:
        raise RowError(f"responses must hold at least 2 answers, found {len(responses)}")
    if ratings is not None and len(ratings) != len(responses):
        raise RowError(f"ratings must be as many as responses: {len(ratings)} and {len(responses)}")
    scores = [_number(rating, "rating") for rating in ratings or range(len(responses), 0, -1)]
    asked = {name: values[name] for name in ("prompt", "messages") if name in values}
    ranked = sorted(zip(scores, responses, strict=True), key=lambda item: -item[0])
    pairs = []
    for (high, better), (low, worse) in combinations(ranked, 2):
        rated = {} if ratings is None else {"margin": high - low, "chosen_score": high, "rejected_score": low}
        pairs.append(
            asked | {"chosen": better, "rejected": worse, "probability": 1.0 if high > low else TIE} | rated
        )
    return pairs


def _list(value: Any, name: str) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None
    if not isinstance(value, list):
        raise RowError(f"{name} must be a list")
    return value


def to_row(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """One prepared row (without source and row number) from raw `values`.

    Raises RowError when the columns that `kind` needs are absent or of the wrong type.
    """
    prompt, replies = _split_messages(values, kind)
    row: dict[str, Any] = {"prompt": readable(prompt), "messages": prompt}
    for name in TEXTS[kind]:
        row[name] = replies[name] if name in replies else _reply(values, name)
    if kind == "preferences":
        row["probability"] = _probability(values.get("probability"))
        for name in ("margin", "chosen_score", "rejected_score"):
            value = values.get(name)
            row[name] = math.nan if value is None or value == "" else _number(value, name)
    return row


def _split_messages(values: Mapping[str, Any], kind: str) -> tuple[list[dict[str, str]], dict[str, str]]:
    """The prompt's messages, and the response when it stood at their end."""
    if values.get("messages") is not None:
        messages = _messages(values["messages"], "messages")
        replies = {}
        if kind == "demonstrations" and "response" not in values:
            if messages[-1]["role"] != "assistant":
                raise RowError("messages must end with the assistant's turn, which is the response")
            replies["response"] = messages.pop()["content"]
        while kind == "prompts" and messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return _check_prompt(messages), replies
    if values.get("prompt") is None:
        raise RowError(f"needs a column prompt (or messages); found {', '.join(map(str, values)) or 'none'}")
    return _check_prompt(_messages(values["prompt"], "prompt")), {}


def _check_prompt(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    if not messages or messages[-1]["role"] != "user":
        raise RowError("the prompt must end with a user's turn")
    return messages


def _messages(value: Any, name: str) -> list[dict[str, str]]:
    value = _maybe_json(value)
    if isinstance(value, str):
        return [{"role": "user", "content": clean(value)}]
    if not isinstance(value, list) or not value:
        raise RowError(f"{name} must be a text or a list of messages, found {type(value).__name__}")
    messages = []
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise RowError(f"{name}: each message needs a role and a content text")
        if message.get("role") not in ROLES:
            raise RowError(f"{name}: role {message.get('role')!r} must be one of {', '.join(ROLES)}")
        messages.append({"role": message["role"], "content": clean(message["content"])})
    return messages


def _reply(values: Mapping[str, Any], name: str) -> str:
    value = _maybe_json(values.get(name))
    if value is None:
        raise RowError(f"needs a column {name}; found {', '.join(map(str, values)) or 'none'}")
    if isinstance(value, str):
        return clean(value)
    messages = _messages(value, name)
    if messages[-1]["role"] != "assistant":
        raise RowError(f"{name} must end with the assistant's turn")
    return messages[-1]["content"]


def _maybe_json(value: Any) -> Any:
    """A list of messages that came as text, from a CSV cell; any other text stays text."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _probability(value: Any) -> float:
    if value is None or value == "":
        return 1.0
    probability = _number(value, "probability")
    if not TIE <= probability <= 1.0:
        raise RowError(
            f"probability {value!r} must be from {TIE} (a tie) to 1; below, swap chosen and rejected"
        )
    return probability


def _number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise RowError(f"{name} {value!r} must be a number") from None


@lru_cache(maxsize=1 << 16)
def clean(text: str) -> str:
    """Undo HTML entities, drop control characters, and fold white space within lines."""
    text = CONTROL.sub("", html.unescape(text).replace("\r\n", "\n"))
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def detect_kind(values: Mapping[str, Any]) -> str:
    """The kind of data that a row's columns suggest."""
    if {"chosen", "rejected", "responses"} & set(values):
        return "preferences"
    messages = _maybe_json(values.get("messages"))
    last = messages[-1] if isinstance(messages, list) and messages else None
    ends_with_answer = isinstance(last, Mapping) and last.get("role") == "assistant"
    return "demonstrations" if "response" in values or ends_with_answer else "prompts"
