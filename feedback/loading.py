"""Queues from JSON lines: a row becomes an item of a project.

A row has `prompt` (a text or a list of messages) or `messages`; `responses` (texts, or objects with text,
policy and decoding) or one `response`; and may have `id`, `group` and `gold`, a vote's value such as
`{"kind": "choice", "choice": "a", "strength": 1}`. A row without an id gets one from its content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from feedback.errors import InputError
from feedback.records import Item, Project

KEYS = {"id", "prompt", "messages", "response", "responses", "group", "gold"}


def read_items(lines: Iterable[str], project: Project, source: str) -> list[Item]:
    """Raises InputError that names `source`, the line and the rule; then nothing was read."""
    found: dict[str, int] = {}
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{source}: line {number}"
        item = _item(_object(line, where), project, where)
        if item.id in found:
            raise InputError(f"{where}: the same item as line {found[item.id]} ({item.id})")
        found[item.id] = number
        rows.append(item)
    if not rows:
        raise InputError(f"{source}: no rows")
    return rows


def chat_items(project: Project, policies: tuple[str, str], count: int) -> list[Item]:
    """`count` conversations to be had with the same two policies."""
    responses = [{"policy": policy} for policy in policies]
    return [
        Item.model_validate(
            {
                "id": f"{project.id}-{n:06d}",
                "project": project.id,
                "kind": project.kind,
                "responses": responses,
            }
        )
        for n in range(count)
    ]


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: an object was expected, found {type(row).__name__}")
    unknown = set(row) - KEYS
    if unknown:
        raise InputError(f"{where}: unknown key {sorted(unknown)[0]!r}; known are {', '.join(sorted(KEYS))}")
    return row


def _item(row: dict[str, Any], project: Project, where: str) -> Item:
    content = json.dumps(row, sort_keys=True, ensure_ascii=False)
    digest = hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()
    prompt = row.get("messages", row.get("prompt", []))
    responses = row.get("responses", [row["response"]] if "response" in row else [])
    values = {
        "id": row.get("id", f"{project.id}-{digest[:12]}"),
        "project": project.id,
        "kind": project.kind,
        "messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
        "responses": [{"text": r} if isinstance(r, str) else r for r in responses]
        if isinstance(responses, list)
        else responses,
        "group": row.get("group", ""),
        "gold": row.get("gold"),
    }
    try:
        return Item.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """The first thing that is wrong, with the field and a short view of its value."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{field}: {message}, found {repr(first['input'])[:80]}" if field else message
