"""Projects and their items: made, changed, read."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, select

from feedback.errors import ConflictError, InputError
from feedback.records import EventType, Item, Project, check_value
from feedback.store import Store
from feedback.tables import items, projects


def create_project(store: Store, actor: str, project: Project, rows: Iterable[Item] = ()) -> int:
    """Add a project with its items, all or nothing. Returns how many items.

    Raises ConflictError when the project or an item exists, InputError for an item that does not fit.
    """
    with store.write() as connection:
        if _record(connection, project.id) is not None:
            raise ConflictError(f"project {project.id!r} exists already")
        payload = {"project": project.model_dump(mode="json")}
        store.append(connection, actor, EventType.PROJECT_CREATED, payload)
        return append_items(store, connection, actor, project, rows)


def add_items(store: Store, actor: str, project_id: str, rows: Iterable[Item]) -> int:
    """Put more items at the end of a project's queue, all or nothing. Raises as `create_project`."""
    with store.write() as connection:
        return append_items(store, connection, actor, get_project(connection, project_id), rows)


def change_guidelines(store: Store, actor: str, project_id: str, guidelines: str) -> None:
    """Replace the guidelines; the log keeps the earlier ones."""
    with store.write() as connection:
        record = get_project(connection, project_id).model_dump(mode="json") | {"guidelines": guidelines}
        project = Project.model_validate(record)
        payload = {"project": project.model_dump(mode="json")}
        store.append(connection, actor, EventType.PROJECT_CHANGED, payload)


def list_projects(store: Store) -> list[Project]:
    """In the order in which they were made."""
    with store.read() as connection:
        query = select(projects.c.record).order_by(projects.c.created)
        return [Project.model_validate(record) for record in connection.scalars(query)]


def get_project(connection: Connection, project_id: str) -> Project:
    """Raises InputError when there is none."""
    record = _record(connection, project_id)
    if record is None:
        raise InputError(f"there is no project {project_id!r}")
    return Project.model_validate(record)


def get_item(connection: Connection, item_id: str) -> Item:
    """Raises InputError when there is none."""
    record = connection.scalar(select(items.c.record).where(items.c.id == item_id))
    if record is None:
        raise InputError(f"there is no item {item_id!r}")
    return Item.model_validate(record)


def _record(connection: Connection, project_id: str) -> dict | None:
    return connection.scalar(select(projects.c.record).where(projects.c.id == project_id))


def append_items(
    store: Store, connection: Connection, actor: str, project: Project, rows: Iterable[Item]
) -> int:
    """`add_items` inside the caller's transaction."""
    known = set(connection.scalars(select(items.c.id)))
    count = 0
    for item in rows:
        if (item.project, item.kind) != (project.id, project.kind):
            raise InputError(f"item {item.id!r} is a {item.kind} of {item.project!r}, not of {project.id!r}")
        if item.id in known:
            raise ConflictError(f"item {item.id!r} exists already")
        if item.gold is not None:
            check_value(item.gold, item.kind, len(item.responses), project)
        known.add(item.id)
        store.append(connection, actor, EventType.ITEM_ADDED, {"item": item.model_dump(mode="json")})
        count += 1
    return count
