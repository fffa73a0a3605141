"""What fills a project's queue: rows of a file, conversations to be had, records of another system."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlalchemy import select

from feedback.errors import ConflictError, InputError
from feedback.formats.jsonl import read_items
from feedback.formats.reading import Imported
from feedback.projects import append_items
from feedback.records import EventType, Item, Project
from feedback.store import Store
from feedback.tables import annotators, items, votes


def items_of_file(path: Path, project: Project, name: str = "") -> list[Item]:
    """The items in a file of JSON lines; see `feedback.formats.jsonl.read_items` for its keys.

    Raises InputError that calls the file `name` and says the line and the rule; then nothing was read.
    """
    try:
        found = read_items(path, project).items
    except (ValueError, RecursionError) as error:
        raise InputError(str(error).replace(str(path), name or str(path))) from None
    if not found:
        raise InputError(f"{name or path}: no rows")
    return found


def make_project(values: Mapping[str, Any]) -> Project:
    """Raises InputError for the first value that breaks a rule."""
    try:
        return Project.model_validate(values)
    except ValidationError as error:
        raise InputError(explain(error)) from None


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


def add_imported(store: Store, actor: str, project: Project, found: Imported) -> tuple[int, int]:
    """Put what another system held into the store; what is there already stays as it is.

    All or nothing. People who voted there get accounts without a secret, so nobody can sign in as them.
    Returns how many items and votes were new. Raises ConflictError for a name that another person has here.
    """
    with store.write() as connection:
        known = set(connection.scalars(select(items.c.id)))
        counted = set(connection.scalars(select(votes.c.id)))
        people = {row.id: row.name for row in connection.execute(select(annotators.c.id, annotators.c.name))}
        number = append_items(
            store, connection, actor, project, [item for item in found.items if item.id not in known]
        )
        for person in found.annotators.values():
            if person.id in people:
                continue
            if person.name in people.values():
                raise ConflictError(f"the name {person.name!r} is taken by another person")
            payload: dict[str, Any] = {"annotator": person.id, "name": person.name, "role": str(person.role)}
            store.append(connection, actor, EventType.ANNOTATOR_ADDED, payload)
        new_votes = [vote for vote in found.votes if vote.id not in counted]
        for vote in new_votes:
            payload = {"vote": vote.model_dump(mode="json"), "annotator": vote.annotator}
            store.append(connection, actor, EventType.VOTE_CAST, payload)
    return number, len(new_votes)


def explain(error: ValidationError) -> str:
    """The first thing that is wrong, with the field and a short view of its value."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{field}: {message}, found {repr(first['input'])[:80]}" if field else message
