"""The project's own form: one record a line, nothing lost; and plain rows of items to put to people.

    {"record": "project", "id": "tone", "name": "Tone", "kind": "pairwise", ...}
    {"record": "item", "id": "i1", "project": "tone", "messages": [...], "responses": [...], ...}
    {"record": "annotator", "id": "ann", "name": "Ann"}
    {"record": "vote", "id": "v1", "item": "i1", "annotator": "ann", "value": {"kind": "choice", ...}, ...}
    {"record": "decision", "item": "i1", "annotator": "ann", "value": {...}, "at": "..."}

Keys are those of feedback/records.py. Lines may stand in any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from feedback.collection import Collection, Decision, collect
from feedback.formats.reading import (
    Element,
    FormatError,
    Imported,
    identifier,
    lines_of,
    messages_of,
    read_objects,
    shown,
)
from feedback.records import Annotator, Item, Project, Record, Response, TaskKind, Vote

RECORDS: dict[str, type[Record]] = {
    "project": Project,
    "item": Item,
    "annotator": Annotator,
    "vote": Vote,
    "decision": Decision,
}
ITEM_KEYS = ("prompt", "messages", "responses", "policies", "decoding", "group", "id", "gold")


def write_collection(collection: Collection) -> str:
    """The text of a file that `read_collection` reads back to an equal collection."""
    parts: list[tuple[str, tuple[Record, ...]]] = [
        ("project", (collection.project,)),
        ("item", collection.items),
        ("annotator", collection.annotators),
        ("vote", collection.votes),
        ("decision", collection.decisions),
    ]
    return lines_of(
        {"record": name} | record.model_dump(mode="json") for name, records in parts for record in records
    )


def read_collection(path: Path) -> Collection:
    """The collection in a file of records.

    Raises FormatError for a line that is no record, and for records that do not fit together.
    """
    found: dict[str, list[Any]] = {name: [] for name in RECORDS}
    for element in read_objects(path):
        name = element.get("record", str, f"must be one of {', '.join(RECORDS)}")
        if name not in RECORDS:
            raise element.error("record", f"{name!r}; must be one of {', '.join(RECORDS)}")
        values = {key: value for key, value in element.values.items() if key != "record"}
        found[name].append(element.make(RECORDS[name], values))
    if len(found["project"]) != 1:
        raise FormatError(path, 1, "record", f"there must be one project, found {len(found['project'])}")
    try:
        return collect(
            found["project"][0], found["item"], found["vote"], found["annotator"], found["decision"]
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_items(path: Path, project: Project) -> Imported:
    """Items to vote on, from rows with `prompt` (or `messages`) and `responses`.

    A response is a text or an object with `text`, `policy` and `decoding`. `policies` and `decoding` may
    also stand beside `responses`, as lists of the same length. `group`, `id` and `gold` are optional. An id
    that is missing is a hash of the row, so the same file gives the same items.
    """
    found = Imported()
    lines: dict[str, int] = {}
    for element in read_objects(path):
        item = _item(element, project)
        if item.id in lines:
            raise element.error("id", f"{item.id!r}; stands in line {lines[item.id]} already")
        lines[item.id] = element.line
        found.items.append(item)
    return found


def _item(element: Element, project: Project) -> Item:
    values = element.values
    for key in values:
        if key not in ITEM_KEYS:
            raise element.error(key, f"unknown key; must be one of {', '.join(ITEM_KEYS)}")
    key = "messages" if "messages" in values else "prompt"
    if key not in values and project.kind is not TaskKind.CHAT:
        raise element.error("prompt", "is missing; an item needs prompt or messages")
    responses = list(_responses(element))
    record = {
        "id": values.get("id") or identifier("item", project.id, sorted(values.items(), key=str)),
        "project": project.id,
        "kind": project.kind,
        "messages": messages_of(element, values[key], key) if key in values else (),
        "responses": responses,
        "group": values.get("group", ""),
        "gold": values.get("gold"),
    }
    return element.make(Item, record)


def _responses(element: Element) -> Iterator[Response]:
    given = element.get("responses", list, "must be a list") if "responses" in element.values else []
    beside: dict[str, list[Any]] = {}
    for name in ("policies", "decoding"):
        if name in element.values:
            beside[name] = element.get(name, list, "must be a list, as long as responses")
            if len(beside[name]) != len(given):
                raise element.error(
                    name, f"{shown(beside[name])}; must be as long as responses, {len(given)}"
                )
    for i, response in enumerate(given):
        values = {"text": response} if isinstance(response, str) else response
        if isinstance(values, dict):
            for name, field in (("policies", "policy"), ("decoding", "decoding")):
                if name in beside:
                    values = values | {field: beside[name][i]}
        yield element.make(Response, values, f"responses.{i}")
