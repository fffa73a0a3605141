"""The default text: conversations between people, from the package chitchat-dataset (MIT, Myers et al. 2020).

Demonstrations are questions asked in a conversation with the other person's answer, prompts are the
questions,
and preferences are conversations on the same opening line that their participants rated differently.
Turns that do not ask anything are left out: without what was said before, they cannot be answered.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlhf_core.data.sources import RawRow
from rlhf_core.errors import InputError

MIN_RATING_GAP = 3.0
SLIDERS = ("witty", "interesting", "upbeat")
UNRATED = 5  # where the sliders stood
RESPONSE_CHARS = 240
# Questions that only make sense after what was said before.
DANGLING = re.compile(
    r"(why|and|or|but|so|oh|really|what about|how about|is it|was it|(did|does) (he|she|it|they))\b.{0,12}$",
    re.I,
)


def chitchat_rows(kind: str) -> Iterator[RawRow]:
    """Raw rows of `kind`, numbered by conversation."""
    conversations = _load()
    if kind == "preferences":
        return _preferences(conversations)
    return _questions(conversations, kind)


@cache  # three kinds of rows are made of it
def _load() -> list[dict[str, Any]]:
    # find_spec and not import: the package's own loader parses every time stamp, which takes a minute.
    spec = importlib.util.find_spec("chitchat_dataset")
    if spec is None or spec.origin is None:
        raise InputError(
            "data source 'package:chitchat': chitchat-dataset is not installed; run `make setup`"
        )
    path = Path(spec.origin).parent / "dataset.json"
    try:
        return list(json.loads(path.read_text(encoding="utf-8")).values())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: missing or damaged ({error}); reinstall chitchat-dataset==0.9.0") from None


def _turns(conversation: dict[str, Any]) -> list[str]:
    return [
        " ".join(message["text"].strip() for message in turn).strip() for turn in conversation["messages"]
    ]


def _questions(conversations: list[dict[str, Any]], kind: str) -> Iterator[RawRow]:
    for number, conversation in enumerate(conversations, start=1):
        turns = _turns(conversation)
        for question, answer in pairwise(turns):
            if not question.endswith("?") or DANGLING.match(question):
                continue
            values = {"prompt": question}
            if kind == "demonstrations":
                values["response"] = answer
            yield RawRow(number, values)


def _preferences(conversations: list[dict[str, Any]]) -> Iterator[RawRow]:
    """Pairs of chats with the same opening line, rated at least MIN_RATING_GAP apart; each chat at most
    once."""
    by_opening: dict[str, list[tuple[float, int, str]]] = defaultdict(list)
    for number, conversation in enumerate(conversations, start=1):
        rating = _rating(conversation)
        turns = _turns(conversation)
        if rating is not None and len(turns) >= 4 and conversation.get("prompt"):
            by_opening[conversation["prompt"]].append((rating, number, _shorten(turns)))
    for opening in sorted(by_opening):
        chats = sorted(by_opening[opening])
        while len(chats) >= 2 and chats[-1][0] - chats[0][0] >= MIN_RATING_GAP:
            (low, _, worse), (high, number, better) = chats.pop(0), chats.pop()
            yield RawRow(
                number,
                {"prompt": opening, "chosen": better, "rejected": worse, "margin": round(high - low, 4)},
            )


def _rating(conversation: dict[str, Any]) -> float | None:
    """Mean of the participant's ratings on witty, interesting and upbeat, 1 to 10; None when no slider was
    moved."""
    ratings = conversation.get("ratings") or {}
    values = [ratings[name] for name in SLIDERS if ratings.get(name) is not None]
    if len(values) < len(SLIDERS) or all(value == UNRATED for value in values):
        return None
    return sum(values) / len(values)


def _shorten(turns: list[str]) -> str:
    """The first turns of a chat, cut at a turn's end below RESPONSE_CHARS."""
    kept: list[str] = []
    for turn in turns:
        if kept and sum(map(len, kept)) + len(turn) > RESPONSE_CHARS:
            break
        kept.append(turn[:RESPONSE_CHARS])
    return "\n".join(kept)
