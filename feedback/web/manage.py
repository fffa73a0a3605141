"""The managers' pages: projects, queues, the live dashboard, flags, the audit log, export."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.responses import Response

from feedback.accounts import list_annotators
from feedback.assignment import clear_flag
from feedback.errors import InputError
from feedback.gathering import gather, queue_state, remarks
from feedback.loading import chat_items, explain, items_of_file, make_project
from feedback.projects import add_items, change_guidelines, create_project, get_project, list_projects
from feedback.records import EventType, Item, Project, TaskKind
from feedback.web.context import Form, Manager, StoreOf, done, page, settings_of, text_field
from feedback.web.dashboard import dashboard, kappas
from feedback.web.security import UPLOADS

router = APIRouter()
LOG_ENTRIES = 300
MOST_CHATS = 10_000


@router.get("/manage")
def overview(request: Request, session: Manager, store: StoreOf) -> Response:
    rows = [(project, queue_state(store, project.id)) for project in list_projects(store)]
    known = sorted(settings_of(request).policies)
    return page(request, "manage.html", session, rows=rows, kinds=list(TaskKind), policies=known)


@router.post(UPLOADS)
def upload(request: Request, session: Manager, store: StoreOf, form: Form) -> Response:
    """Make a project, or add items to one, from a file of JSON lines."""
    existing = text_field(form, "project")
    if existing:
        with store.read() as connection:
            project = get_project(connection, existing)
        add_items(store, session.who.id, project.id, _rows(form, project))
    else:
        project = _project(form)
        create_project(store, session.who.id, project, _rows(form, project))
    return done(request, f"/manage/p/{project.id}")


@router.get("/manage/p/{project_id}")
def project_page(request: Request, project_id: str, session: Manager, store: StoreOf) -> Response:
    values = dashboard(store, project_id)
    if request.query_params.get("part") == "live":
        return page(request, "_live.html", session, **values)
    flagged, skipped = remarks(store, project_id)
    names = {person.id: person.name for person in list_annotators(store)}
    return page(request, "dashboard.html", session, **values, flagged=flagged, skipped=skipped, names=names)


@router.get("/manage/p/{project_id}/pairs")
def pairs_page(request: Request, project_id: str, session: Manager, store: StoreOf) -> Response:
    """How far each two annotators agree; apart from the dashboard, since there may be very many."""
    found = gather(store, project_id)
    names = {person.id: person.name for person in found.annotators}
    return page(request, "pairs.html", session, project=found.project, names=names, rows=kappas(found))


@router.post("/manage/p/{project_id}/guidelines")
def guidelines(request: Request, project_id: str, session: Manager, store: StoreOf, form: Form) -> Response:
    try:
        change_guidelines(store, session.who.id, project_id, text_field(form, "guidelines"))
    except ValidationError as error:
        raise InputError(explain(error)) from None
    return done(request, f"/manage/p/{project_id}")


@router.post("/manage/p/{project_id}/clear")
def clear(request: Request, project_id: str, session: Manager, store: StoreOf, form: Form) -> Response:
    clear_flag(store, session.who.id, text_field(form, "item"))
    return done(request, f"/manage/p/{project_id}")


@router.get("/manage/p/{project_id}/votes.jsonl")
def export(project_id: str, session: Manager, store: StoreOf) -> Response:
    """Every vote that stands, as records."""
    votes = gather(store, project_id).votes
    store.log(session.who.id, EventType.EXPORTED, {"project": project_id, "votes": len(votes)})
    text = "".join(json.dumps(vote.model_dump(mode="json"), ensure_ascii=False) + "\n" for vote in votes)
    name = f"{project_id}-votes.jsonl"
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(text, media_type="application/x-ndjson; charset=utf-8", headers=headers)


@router.get("/manage/log")
def audit_log(request: Request, session: Manager, store: StoreOf) -> Response:
    names = {person.id: person.name for person in list_annotators(store)}
    entries = [
        (entry, names.get(entry.actor, entry.actor), json.dumps(entry.payload, ensure_ascii=False)[:400])
        for entry in store.events(newest=LOG_ENTRIES)
    ]
    return page(request, "log.html", session, entries=entries)


def _project(form: FormData) -> Project:
    values: dict[str, Any] = {
        name: text_field(form, name).strip() for name in ("id", "name", "kind", "guidelines", "scale")
    }
    values |= {
        name: text_field(form, name)
        for name in ("overlap_votes", "overlap_share", "gold_share", "lease_seconds")
        if text_field(form, name)
    }
    values["scale"] = int(values["scale"] or 5) if values["scale"] in ("", "5", "10") else values["scale"]
    values["criteria"] = tuple(filter(None, map(str.strip, text_field(form, "criteria").split(","))))
    return make_project(values)


def _rows(form: FormData, project: Project) -> list[Item]:
    file = form.get("file")
    if isinstance(file, UploadFile) and file.filename:
        with tempfile.NamedTemporaryFile(suffix=".jsonl") as copy:
            shutil.copyfileobj(file.file, copy)
            copy.flush()
            return items_of_file(Path(copy.name), project, file.filename[:100])
    if project.kind is TaskKind.CHAT:
        return _chats(form, project)
    raise InputError("choose a file of JSON lines")


def _chats(form: FormData, project: Project) -> list[Item]:
    first, second, count = (text_field(form, name).strip() for name in ("first", "second", "count"))
    if not first or not second:
        raise InputError("name two policies")
    if not count.isdecimal() or not 1 <= int(count[:9]) <= MOST_CHATS:
        raise InputError(f"conversations: 1 to {MOST_CHATS}, found {count[:20]!r}")
    return chat_items(project, (first, second), int(count))
