"""The application: pages, static files, guards, and what people see when something goes wrong."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response

from feedback.accounts import new_token
from feedback.errors import (
    ConflictError,
    FeedbackError,
    InputError,
    KeyUsedError,
    NotAllowedError,
    StoreUnavailableError,
)
from feedback.policies import PolicyError
from feedback.store import Store
from feedback.web import adjudicate, annotate, manage, people, signin
from feedback.web.context import HERE, Settings, SignInNeeded, page, wants_json
from feedback.web.security import Guard, log_refusal

STATUS: dict[type[FeedbackError], int] = {
    InputError: 422,
    NotAllowedError: 403,
    ConflictError: 409,
    PolicyError: 502,
    StoreUnavailableError: 503,
}


def create_app(store: Store, settings: Settings | None = None) -> FastAPI:
    """The service over `store`. Who closes the store is the caller."""
    settings = settings or Settings()
    app = FastAPI(title="Feedback", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.store, app.state.settings, app.state.local_token = store, settings, new_token()
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    for module in (signin, annotate, adjudicate, manage, people):
        app.include_router(module.router)
    app.add_api_route("/health", _health, methods=["GET"])
    app.add_exception_handler(SignInNeeded, _sign_in)
    app.add_exception_handler(FeedbackError, _expected)
    app.add_exception_handler(HTTPException, _http)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(settings.hosts), www_redirect=False)
    app.add_middleware(Guard, store=store, rates=settings.rates, cookie=settings.cookie)
    return app


def _health(request: Request) -> Response:
    with request.app.state.store.read() as connection:
        connection.exec_driver_sql("SELECT 1")
    return PlainTextResponse("ok")


def _sign_in(request: Request, error: Exception) -> Response:
    if wants_json(request):
        return JSONResponse({"error": "Your session has ended. Sign in again; your draft is kept."}, 401)
    if request.method != "GET":
        return page(request, "error.html", None, 401, message="Your session has ended. Sign in again.")
    return RedirectResponse("/login", 303)


def _expected(request: Request, error: Exception) -> Response:
    status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)
    if isinstance(error, KeyUsedError) and wants_json(request):
        return JSONResponse({"error": str(error), "new_key": True}, status)
    return _answer(request, status, str(error))


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _answer(request, error.status_code, str(error.detail))


def _answer(request: Request, status: int, message: str) -> Response:
    if status in (403, 413, 415):
        person = getattr(request.state, "person", None)
        state = request.app.state
        log_refusal(state.store, state.settings.rates, request.scope, status, message, person and person.id)
    if wants_json(request):
        return JSONResponse({"error": message}, status)
    return page(request, "error.html", None, status, message=message[:1].upper() + message[1:])
