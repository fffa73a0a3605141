"""What every page needs: who asks, the form they sent, and a template to answer with."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Request
from fastapi.templating import Jinja2Templates
from starlette.datastructures import FormData
from starlette.responses import JSONResponse, RedirectResponse, Response

from feedback.accounts import csrf_token, find_session
from feedback.errors import NotAllowedError
from feedback.policies import ChatPolicy
from feedback.records import Annotator, Role
from feedback.store import Store
from feedback.web.security import Rates
from feedback.web.text import markdown

HERE = Path(__file__).parent
LOCAL = "local"

templates = Jinja2Templates(directory=HERE / "templates")
templates.env.filters["markdown"] = markdown


@dataclass(frozen=True)
class Settings:
    """How the service was started."""

    policies: Mapping[str, ChatPolicy] = field(default_factory=dict)  # by the name that chat items use
    secure: bool = False  # behind HTTPS: the cookie goes over nothing else
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost")
    local: Annotator | None = None  # everybody is this person: no sign-in, on loopback alone
    rates: Rates = field(default_factory=Rates)

    @property
    def cookie(self) -> str:
        return "__Host-rlhf-feedback" if self.secure else "rlhf-feedback"


class SignInNeeded(Exception):
    """Nobody is signed in, or the session has ended."""


@dataclass(frozen=True)
class Session:
    who: Annotator
    token: str

    @property
    def csrf(self) -> str:
        return csrf_token(self.token)


def store_of(request: Request) -> Store:
    return request.app.state.store


def settings_of(request: Request) -> Settings:
    return request.app.state.settings


def session_of(request: Request) -> Session:
    """Raises SignInNeeded."""
    settings = settings_of(request)
    if settings.local is not None:
        return Session(settings.local, request.app.state.local_token)
    token = request.cookies.get(settings.cookie, "")
    who = find_session(store_of(request), token) if token else None
    if who is None:
        raise SignInNeeded
    request.state.person = who
    return Session(who, token)


def _requires(role: Role):
    def check(session: Annotated[Session, Depends(session_of)]) -> Session:
        if not session.who.role.includes(role):
            raise NotAllowedError(f"this needs the role {role}; yours is {session.who.role}")
        return session

    return check


async def form_of(request: Request, session: Annotated[Session, Depends(session_of)]) -> FormData:
    """The form of a signed-in person, after its CSRF token was checked. Raises NotAllowedError."""
    form = await read_form(request)
    given = form.get("csrf") or request.headers.get("x-csrf-token", "")
    if not isinstance(given, str) or not secrets.compare_digest(given.encode(), session.csrf.encode()):
        raise NotAllowedError("the form's token is not this session's; load the page again")
    return form


async def read_form(request: Request) -> FormData:
    """Raises HTTPException when the body is no form."""
    kind = request.headers.get("content-type", "").split(";")[0]
    if kind not in ("application/x-www-form-urlencoded", "multipart/form-data"):
        raise HTTPException(415, "a form was expected")
    return await request.form(max_files=1, max_fields=100, max_part_size=2**20)


StoreOf = Annotated[Store, Depends(store_of)]
Signed = Annotated[Session, Depends(session_of)]
Adjudicator = Annotated[Session, Depends(_requires(Role.ADJUDICATOR))]
Manager = Annotated[Session, Depends(_requires(Role.MANAGER))]
Form = Annotated[FormData, Depends(form_of)]


def text_field(form: FormData, name: str, default: str = "") -> str:
    value = form.get(name, default)
    if not isinstance(value, str):
        return default
    return value.replace("\r\n", "\n").replace("\x00", "")  # which PostgreSQL's texts cannot hold


def page(
    request: Request, template: str, session: Session | None, status: int = 200, **values: Any
) -> Response:
    context = {"who": session.who if session else None, "csrf": session.csrf if session else ""} | values
    context["local"] = settings_of(request).local is not None
    return templates.TemplateResponse(request, template, context, status_code=status)


def wants_json(request: Request) -> bool:
    return "application/json" in request.headers.get("accept", "")


def done(request: Request, target: str) -> Response:
    """Where to go after a form was taken: as data for a script, by redirect for a browser."""
    if wants_json(request):
        return JSONResponse({"next": target})
    return RedirectResponse(target, 303)
