"""What stands before every endpoint: the key, the size of bodies, where a request comes from."""

from __future__ import annotations

import hmac
import logging

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from feedback.web.security import SAFE_METHODS, client_of, counted, same_origin, with_headers
from serving.errors import ApiError
from serving.service import Limits

log = logging.getLogger(__name__)


def is_known(headers: Headers, key: str) -> bool:
    """Whether the request carries the key, compared in constant time; always where none is asked for."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    same = hmac.compare_digest(given.strip().encode(), key.encode())
    return not key or (same and scheme.lower() == "bearer")


class Guard:
    """ASGI middleware; refusals are in OpenAI's form and are logged without anything that was sent."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sending = with_headers(send, scope)
        refusal = self._refusal(scope, Headers(scope=scope))
        if refusal is None:
            await self._app(scope, counted(receive, self._limits.most_body), sending)
            return
        log.warning(
            "refused %s %s from %s: %d",
            scope["method"],
            scope["path"][:200],
            client_of(scope),
            refusal.status,
        )
        headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else None
        await JSONResponse(refusal.body(), refusal.status, headers)(scope, receive, sending)

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        if scope["path"].startswith("/v1/") and not is_known(headers, self._limits.key):
            return ApiError(401, "this server asks for its key, as Bearer token", code="invalid_api_key")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._limits.most_body:
            return too_large(self._limits)
        if scope["method"] in SAFE_METHODS:
            return None
        if not same_origin(scope, headers):
            return ApiError(403, "this request came from another site", code="forbidden_origin")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            return ApiError(415, f"the body must be application/json, found {kind[:80]!r}")
        return None


def too_large(limits: Limits) -> ApiError:
    return ApiError(413, f"the body must be at most {limits.most_body} bytes", code="body_too_large")
