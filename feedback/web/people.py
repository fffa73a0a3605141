"""Who may come in, and as what; leaving somebody's votes out; erasing a person."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response

from feedback import accounts
from feedback.errors import InputError
from feedback.loading import explain
from feedback.records import Annotator, Role
from feedback.store import Store
from feedback.web.context import Form, Manager, Session, StoreOf, done, page, text_field

router = APIRouter()


@router.get("/manage/people")
def people(request: Request, session: Manager, store: StoreOf) -> Response:
    return _page(request, session, store)


@router.post("/manage/people")
def add(request: Request, session: Manager, store: StoreOf, form: Form) -> Response:
    """Make an account; its token is shown on this answer and nowhere else."""
    try:
        person, secret = accounts.add_annotator(
            store, session.who.id, text_field(form, "name"), _role(text_field(form, "role"))
        )
    except ValidationError as error:
        raise InputError(explain(error)) from None
    return _page(request, session, store, shown=(person.name, secret))


@router.post("/manage/people/{person_id}")
def change(request: Request, person_id: str, session: Manager, store: StoreOf, form: Form) -> Response:
    match text_field(form, "act"):
        case "role":
            accounts.change_annotator(store, session.who.id, person_id, role=_role(text_field(form, "role")))
        case "exclude" | "include" as act:
            accounts.change_annotator(store, session.who.id, person_id, excluded=act == "exclude")
        case "block" | "allow" as act:
            accounts.change_annotator(store, session.who.id, person_id, active=act == "allow")
        case "token":
            secret = accounts.new_secret(store, person_id)
            return _page(request, session, store, shown=(_find(store, person_id).name, secret))
        case other:
            raise InputError(f"unknown act {other[:20]!r}")
    return done(request, "/manage/people")


@router.post("/manage/people/{person_id}/erase")
def erase(request: Request, person_id: str, session: Manager, store: StoreOf, form: Form) -> Response:
    person = _find(store, person_id)
    if text_field(form, "name") != person.name:
        raise InputError("type the name of the person whose data you want to delete")
    entries = accounts.erase_account(store, session.who.id, person_id, "asked for")
    if person_id == session.who.id:
        return done(request, "/login")
    return _page(request, session, store, erased=entries)


def _page(request: Request, session: Session, store: Store, **values) -> Response:
    everybody = accounts.list_annotators(store)
    return page(request, "people.html", session, people=everybody, roles=list(Role), **values)


def _role(text: str) -> Role:
    try:
        return Role(text)
    except ValueError:
        raise InputError(f"role {text[:20]!r} must be one of {', '.join(Role)}") from None


def _find(store: Store, person_id: str) -> Annotator:
    with store.read() as connection:
        return accounts.get_annotator(connection, person_id)
