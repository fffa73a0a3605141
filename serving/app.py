"""The application: endpoints in OpenAI's form, the page, and what clients see when something goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates

from feedback.errors import ConflictError, StoreUnavailableError
from feedback.production import UnknownAnswerError
from feedback.web.context import HERE as FEEDBACK
from rlhf_core.chat_form import completion
from serving.answering import Answering, Gone
from serving.errors import ApiError, error_body
from serving.guard import Guard, is_known, too_large
from serving.replies import EventStream, marks
from serving.requests import read_chat, read_feedback, read_json
from serving.service import Service

HERE = Path(__file__).parent
CLIENT_CLOSED = 499  # nobody reads it
templates = Jinja2Templates(directory=HERE / "templates")


def create_app(service: Service) -> Starlette:
    """The endpoints over a service that was started."""
    app = Starlette(
        routes=[
            Route("/", _page),
            Route("/healthz", _health),
            Route("/v1/models", _models),
            Route("/v1/chat/completions", _chat, methods=["POST"]),
            Route("/v1/feedback", _feedback, methods=["POST"]),
            Mount("/static/feedback", StaticFiles(directory=FEEDBACK / "static")),
            Mount("/static", StaticFiles(directory=HERE / "static")),
        ],
        middleware=[
            Middleware(Guard, limits=service.limits),
            Middleware(TrustedHostMiddleware, allowed_hosts=list(service.limits.hosts), www_redirect=False),
        ],
        exception_handlers={ApiError: _refused, HTTPException: _http, 500: _broken},
    )
    app.state.service = service
    return app


def _service(request: Request) -> Service:
    return request.app.state.service


async def _page(request: Request) -> Response:
    service = _service(request)
    values = {"name": service.fleet.name, "logging": service.recorder is not None}
    return templates.TemplateResponse(request, "page.html", values | {"key": bool(service.limits.key)})


async def _health(request: Request) -> Response:
    """Everything for who has the key; others learn whether it serves."""
    service = _service(request)
    state = service.state()
    if not is_known(request.headers, service.limits.key):
        state = {"status": state["status"]}
    return JSONResponse(state, 503 if service.fleet.draining else 200)


async def _models(request: Request) -> Response:
    service = _service(request)
    data = [
        {"id": name, "object": "model", "created": 0, "owned_by": "rlhf"} for name in service.fleet.models()
    ]
    return JSONResponse({"object": "list", "data": data})


async def _chat(request: Request) -> Response:
    service = _service(request)
    limits = service.limits
    wanted = read_chat(await _body(request), request.headers, limits.most_tokens, limits.slots)
    answering = await Answering.open(service.fleet, wanted)
    if wanted.stream:
        return EventStream(answering, service.recorder)
    try:
        async with answering.while_asked(request):
            async for _ in answering.pieces():
                pass
            return JSONResponse(await _whole(service, answering), headers=marks(answering))
    except Gone:
        return Response(status_code=CLIENT_CLOSED)
    finally:
        answering.close()


async def _whole(service: Service, answering: Answering) -> dict[str, Any]:
    choices, version = answering.choices(), answering.live.version
    stored = False
    if service.recorder and answering.wanted.consent:
        stored = await service.recorder.keep(answering.id, answering.wanted, choices, version)
    found = completion(choices, answering.prompt_tokens, model=version.name, name=answering.id)
    return found | {"system_fingerprint": version.label, "feedback": {"stored": stored}}


async def _feedback(request: Request) -> Response:
    service = _service(request)
    rating = read_feedback(await _body(request))
    if service.recorder is None:
        raise ApiError(
            404, "this server keeps no answers, so there is none to rate", param="id", code="logging_off"
        )
    try:
        rated = await run_in_threadpool(service.recorder.rate, rating)
    except UnknownAnswerError as error:
        raise ApiError(404, f"id: {error}", param="id", code="unknown_id") from None
    except ConflictError as error:
        raise ApiError(409, str(error), code="decided") from None
    except StoreUnavailableError as error:
        raise ApiError(503, str(error), code="store_unavailable") from None
    return JSONResponse({"id": rating.answer, "object": "feedback", "replaced": rated.replaced})


async def _body(request: Request) -> dict[str, Any]:
    try:
        return read_json(await request.body())
    except HTTPException as error:
        if error.status_code == 413:
            raise too_large(_service(request).limits) from None
        raise


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, error.headers)


async def _broken(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body(500, "the server failed; its log says why"), 500)
