"""In and out."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from starlette.datastructures import FormData
from starlette.responses import RedirectResponse, Response

from feedback import accounts
from feedback.web.context import Form, Signed, StoreOf, page, read_form, settings_of, text_field
from feedback.web.security import client_of

router = APIRouter()


@router.get("/login")
def login_page(request: Request) -> Response:
    if settings_of(request).local is not None:
        return RedirectResponse("/", 303)
    return page(request, "login.html", None, message="")


@router.post("/login")
def login(request: Request, store: StoreOf, form: FormData = Depends(read_form)) -> Response:  # noqa: B008
    settings = settings_of(request)
    name, secret = text_field(form, "name"), text_field(form, "secret")
    if not settings.rates.allows_sign_in(client_of(request.scope), name):
        return page(request, "login.html", None, 429, message="Too many tries. Wait a minute.")
    found = accounts.sign_in(store, name, secret.strip())
    if found is None:
        return page(request, "login.html", None, 401, message="Name and secret do not fit together.")
    answer = RedirectResponse("/", 303)
    answer.set_cookie(
        settings.cookie,
        found[1],
        max_age=int(accounts.SESSION_SECONDS),
        httponly=True,
        secure=settings.secure,
        samesite="lax",
        path="/",
    )
    return answer


@router.post("/logout")
def logout(request: Request, store: StoreOf, session: Signed, form: Form) -> Response:
    accounts.sign_out(store, session.token, session.who)
    answer = RedirectResponse("/login", 303)
    settings = settings_of(request)
    answer.delete_cookie(settings.cookie, path="/", secure=settings.secure, httponly=True, samesite="lax")
    return answer
