"""The annotators' pages: what to do next, and what comes of it."""

from __future__ import annotations

import secrets

from fastapi import APIRouter, Request
from starlette.responses import Response

from feedback import assignment
from feedback.errors import InputError
from feedback.policies import ask_both
from feedback.projects import get_project, list_projects
from feedback.records import MOST_TEXT, Identifier, Message, TaskKind
from feedback.web.context import Form, Signed, StoreOf, done, page, settings_of, text_field
from feedback.web.forms import by_position, read_value

router = APIRouter()
MOST_TURNS = 50
NO_CLOCK = 1e9  # seconds, where the page has no script: the store's own measure is less


@router.get("/")
def home(request: Request, session: Signed, store: StoreOf) -> Response:
    rows = [
        (project, assignment.progress(store, session.who, project.id)) for project in list_projects(store)
    ]
    return page(request, "home.html", session, rows=rows)


@router.get("/p/{project_id}")
def next_page(request: Request, project_id: str, session: Signed, store: StoreOf) -> Response:
    shown = assignment.next_item(store, session.who, project_id)
    progress = assignment.progress(store, session.who, project_id)
    if shown is None:
        with store.read() as connection:
            project = get_project(connection, project_id)
        return page(request, "finished.html", session, project=project, progress=progress)
    return page(request, "annotate.html", session, **shown_values(shown), progress=progress)


def shown_values(shown: assignment.Shown) -> dict:
    """What the template needs, by position: nothing that tells the sides or the policies."""
    texts = by_position(shown, [response.text for response in shown.item.responses])
    turns = [(turn.user, by_position(shown, turn.replies)) for turn in shown.turns]
    return {
        "project": shown.project,
        "item_id": shown.item.id,
        "kind": str(shown.item.kind),
        "messages": shown.item.messages,
        "texts": texts,
        "turns": turns,
        "letters": "ABCDEFGHI",
        "form_key": secrets.token_hex(16),  # where no script makes one; the same form sent twice counts once
    }


@router.get("/p/{project_id}/guidelines")
def guidelines(request: Request, project_id: str, session: Signed, store: StoreOf) -> Response:
    with store.read() as connection:
        project = get_project(connection, project_id)
    return page(request, "guidelines.html", session, project=project)


@router.post("/p/{project_id}/vote")
def vote(request: Request, project_id: str, session: Signed, store: StoreOf, form: Form) -> Response:
    item, key = text_field(form, "item"), checked_key(text_field(form, "key"))
    shown = assignment.shown_for_vote(store, session.who, item, key)
    value = read_value(form, shown)
    assignment.cast_vote(store, session.who, item, key, value, read_seconds(text_field(form, "seconds")))
    return done(request, f"/p/{project_id}")


@router.post("/p/{project_id}/skip")
def skip(request: Request, project_id: str, session: Signed, store: StoreOf, form: Form) -> Response:
    assignment.skip_item(store, session.who, text_field(form, "item"), text_field(form, "reason"))
    return done(request, f"/p/{project_id}")


@router.post("/p/{project_id}/flag")
def flag(request: Request, project_id: str, session: Signed, store: StoreOf, form: Form) -> Response:
    assignment.flag_item(store, session.who, text_field(form, "item"), text_field(form, "reason"))
    return done(request, f"/p/{project_id}")


@router.post("/p/{project_id}/undo")
def undo(request: Request, project_id: str, session: Signed, store: StoreOf, form: Form) -> Response:
    act = text_field(form, "act")
    if act and not (act.isascii() and act.isdecimal() and len(act) < 19):
        raise InputError("the act to undo is not valid; load the page again")
    assignment.undo(store, session.who, project_id, int(act) if act else None)
    return done(request, f"/p/{project_id}")


@router.post("/p/{project_id}/turn")
def turn(request: Request, project_id: str, session: Signed, store: StoreOf, form: Form) -> Response:
    """Say something to both policies. Each sees its own side of the conversation only."""
    shown = assignment.held_item(store, session.who, text_field(form, "item"))
    key, text = checked_key(text_field(form, "key")), text_field(form, "text").strip()
    if shown.item.kind is not TaskKind.CHAT:
        raise InputError("this item is no chat")
    if not text or len(text) > MOST_TEXT // 10:
        raise InputError(f"a message has 1 to {MOST_TEXT // 10} characters, found {len(text)}")
    if len(shown.turns) >= MOST_TURNS:
        raise InputError(f"a chat has at most {MOST_TURNS} turns; vote now")
    replies = _ask(request, shown, text)
    assignment.add_turn(store, session.who, shown.item.id, key, text, replies)
    return done(request, f"/p/{project_id}")


def _ask(request: Request, shown: assignment.Shown, text: str) -> tuple[str, ...]:
    known = settings_of(request).policies
    names = [response.policy for response in shown.item.responses]
    if not all(name in known for name in names):
        raise InputError("a policy of this chat is not connected; tell the manager")
    conversations = [
        [*shown.item.messages, *_said(shown.turns, response), Message(role="user", content=text)]
        for response in range(len(names))
    ]
    return ask_both([known[name] for name in names], conversations)


def _said(turns: tuple[assignment.Turn, ...], response: int) -> list[Message]:
    said = []
    for one in turns:
        said.append(Message(role="user", content=one.user))
        said.append(Message(role="assistant", content=one.replies[response]))
    return said


def checked_key(key: str) -> str:
    """An idempotency key that the page made. Raises InputError."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Identifier).validate_python(key)
    except ValidationError:
        raise InputError("the key of this vote is not valid; load the page again") from None


def read_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        return NO_CLOCK
    return seconds if 0.0 <= seconds <= NO_CLOCK else NO_CLOCK
