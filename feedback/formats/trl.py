"""TRL's data set types, plain or conversational: preference, unpaired preference, prompt-completion, prompt.

Out: from the rows of a snapshot. In: items, and the labels as votes of one annotator when one is named.
docs/feedback-data.md says what is lost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from feedback.formats.reading import Element, Imported, identifier, messages_of, read_objects, shown
from feedback.records import Annotator, Item, Message, Project, Response, TaskKind, Vote
from feedback.rows import TIE

Row = Mapping[str, Any]


def preference(rows: Iterable[Row], *, conversational: bool = True) -> list[dict[str, Any]]:
    """Preference rows with `margin` where there is one. Ties and pairs without a sure winner have no place in
    this form: a tie gives no row, any other pair its likelier order."""
    found = []
    for row in rows:
        if row["probability"] > TIE:
            sides = {side: _completion(row[side], conversational) for side in ("chosen", "rejected")}
            margin = {"margin": row["margin"]} if "margin" in row else {}
            found.append({"prompt": _prompt(row, conversational), **sides, **margin})
    return found


def unpaired_preference(rows: Iterable[Row], *, conversational: bool = True) -> list[dict[str, Any]]:
    """Rows of `labels.jsonl` as completions with a label."""
    return [
        {
            "prompt": _prompt(row, conversational),
            "completion": _completion(row["completion"], conversational),
            "label": row["label"],
        }
        for row in rows
    ]


def prompt_completion(rows: Iterable[Row], *, conversational: bool = True) -> list[dict[str, Any]]:
    """Rows of `demonstrations.jsonl`."""
    return [
        {
            "prompt": _prompt(row, conversational),
            "completion": _completion(row["response"], conversational),
        }
        for row in rows
    ]


def _prompt(row: Row, conversational: bool) -> Any:
    return row["messages"] if conversational else row["prompt"]


def _completion(text: str, conversational: bool) -> Any:
    return [{"role": "assistant", "content": text}] if conversational else text


@dataclass(frozen=True)
class Labeller:
    """In whose name, and of what time, labels of a file become votes."""

    annotator: Annotator
    at: datetime


def read_rows(path: Path, project: Project, labeller: Labeller | None = None) -> Imported:
    """Items for `project`, from rows of the type that its kind takes.

    pairwise: preference (the prompt may be implicit in conversational rows). label: unpaired preference, or
    prompt-completion without labels. rating, critique: prompt-completion. correction: prompt, with or
    without completion. Rows that repeat are taken once. Raises ValueError for rankings and chats, which TRL
    has no type for, and FormatError that names file, line, key and rule.
    """
    if project.kind in (TaskKind.RANKING, TaskKind.CHAT):
        raise ValueError(f"project {project.id}: TRL has no data set type for a {project.kind} project")
    found = Imported()
    seen: dict[str, int] = {}
    for element in read_objects(path):
        read = _pair if project.kind is TaskKind.PAIRWISE else _single
        prompt, texts, value = read(element, project)
        item = _item(element, project, prompt, texts)
        if item.id in seen:
            found.skip("row that repeats")
            continue
        seen[item.id] = element.line
        found.items.append(item)
        if value is not None and labeller is not None:
            found.votes.append(_vote(element, item, value, labeller))
            found.annotators[labeller.annotator.id] = labeller.annotator
    return found


Parsed = tuple[tuple[Message, ...], list[str], dict[str, Any] | None]


def _pair(element: Element, project: Project) -> Parsed:
    sides = {}
    for name in ("chosen", "rejected"):
        sides[name] = element.get(name, (str, list), "must be a text or a list of messages")
    if "prompt" in element.values:
        prompt = messages_of(element, element.values["prompt"], "prompt")
        texts = {name: _last(element, side, name) for name, side in sides.items()}
    else:
        prompt, texts = _implicit(element, sides)
    # Which of the two is `a` must not tell which was chosen.
    order = sorted(texts, key=lambda name: hashlib.sha256(texts[name].encode()).hexdigest())
    value = {"kind": "choice", "choice": "ab"[order.index("chosen")], "strength": 1}
    return prompt, [texts[name] for name in order], value


def _implicit(element: Element, sides: Mapping[str, Any]) -> tuple[tuple[Message, ...], dict[str, str]]:
    """The turns that both sides share are the prompt."""
    if not all(isinstance(side, list) for side in sides.values()):
        raise element.error("prompt", "is missing; only conversational rows may leave it out")
    turns = {name: messages_of(element, side, name) for name, side in sides.items()}
    prompt = turns["chosen"][:-1]
    if prompt != turns["rejected"][:-1] or not prompt:
        raise element.error("rejected", "must have the turns of chosen, but for the last one")
    return prompt, {name: _last(element, sides[name], name) for name in sides}


def _single(element: Element, project: Project) -> Parsed:
    if "prompt" not in element.values:
        raise element.error("prompt", "is missing")
    prompt = messages_of(element, element.values["prompt"], "prompt")
    if "completion" not in element.values:
        if project.kind is TaskKind.CORRECTION:
            return prompt, [], None
        raise element.error("completion", f"is missing; a {project.kind} project needs an answer")
    texts = [_last(element, element.values["completion"], "completion")]
    if project.kind is not TaskKind.LABEL or "label" not in element.values:
        return prompt, texts, None
    return prompt, texts, {"kind": "label", "good": element.get("label", bool, "must be true or false")}


def _last(element: Element, value: Any, key: str) -> str:
    """A text, or the content of the last message, which must be the assistant's."""
    if isinstance(value, str):
        return value
    last = messages_of(element, value, key)[-1]
    if last.role != "assistant":
        raise element.error(key, f"ends with a turn of {shown(last.role)}; must end with the assistant's")
    return last.content


def _item(element: Element, project: Project, prompt: tuple[Message, ...], texts: list[str]) -> Item:
    turns = [[message.role, message.content] for message in prompt]
    record = {
        "id": identifier("item", project.id, turns, texts),
        "project": project.id,
        "kind": project.kind,
        "messages": prompt,
        "responses": [Response(text=text) for text in texts],
    }
    return element.make(Item, record)


def _vote(element: Element, item: Item, value: dict[str, Any], labeller: Labeller) -> Vote:
    record = {
        "id": identifier("vote", item.project, item.id, labeller.annotator.id),
        "project": item.project,
        "item": item.id,
        "annotator": labeller.annotator.id,
        "kind": item.kind,
        "value": value,
        "seconds": 0.0,
        "at": labeller.at,
    }
    return element.make(Vote, record)
