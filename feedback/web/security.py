"""What stands before every page: size of bodies, origin of requests, rates, and headers of answers."""

from __future__ import annotations

import logging
from urllib.parse import urlsplit

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from feedback.errors import FeedbackError
from feedback.records import EventType
from feedback.store import Store

MOST_BODY = 2**20  # bytes of a form
MOST_UPLOAD = 2**26  # bytes of a manager's file
UPLOADS = "/manage/upload"
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
log = logging.getLogger(__name__)


class Rates:
    """How many requests in any minute; kept in memory, so per process and gone with it."""

    def __init__(self, per_client: int = 3000, per_session: int = 300, sign_ins: int = 10) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._per_client = RateLimitItemPerMinute(per_client)
        self._per_session = RateLimitItemPerMinute(per_session)
        self._sign_ins = RateLimitItemPerMinute(sign_ins)
        self._client_sign_ins = RateLimitItemPerMinute(6 * sign_ins)  # a whole office may share an address
        self._log_entries = RateLimitItemPerMinute(30)

    def allows(self, client: str, session: str) -> bool:
        allowed = self._limiter.hit(self._per_client, "client", client)
        return allowed and (not session or self._limiter.hit(self._per_session, "session", session))

    def allows_sign_in(self, client: str, name: str) -> bool:
        """By client and by name, so that neither guessing many names nor from many places goes far."""
        by_client = self._limiter.hit(self._client_sign_ins, "sign-in", client)
        return self._limiter.hit(self._sign_ins, "name", name[:200]) and by_client

    def allows_log(self, client: str) -> bool:
        return self._limiter.hit(self._log_entries, "log", client)


class Guard:
    """ASGI middleware: refuses what is too much, too large or from another site, and logs it."""

    def __init__(self, app: ASGIApp, store: Store, rates: Rates, cookie: str) -> None:
        self._app, self._store, self._rates, self._cookie = app, store, rates, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        most = MOST_UPLOAD if scope["path"] == UPLOADS else MOST_BODY
        refusal = self._refusal(scope, headers, most)
        if refusal:
            status, reason = refusal
            await self._log(scope, status, reason)
            again = {"Retry-After": "60"} if status == 429 else None
            answer = PlainTextResponse(reason, status, headers=again)
            await answer(scope, receive, with_headers(send, scope))
            return
        await self._app(scope, counted(receive, most), with_headers(send, scope))

    def _refusal(self, scope: Scope, headers: Headers, most: int) -> tuple[int, str] | None:
        if not scope["path"].startswith("/static/"):
            session = _cookie(headers, self._cookie)
            if not self._rates.allows(client_of(scope), session):
                return 429, "Too many requests; wait a minute. What you wrote is kept in your browser."
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > most:
            return 413, f"The body is larger than {most} bytes."
        if scope["method"] not in SAFE_METHODS and not same_origin(scope, headers):
            return 403, "This request came from another site."
        return None

    async def _log(self, scope: Scope, status: int, reason: str) -> None:
        from starlette.concurrency import run_in_threadpool

        await run_in_threadpool(log_refusal, self._store, self._rates, scope, status, reason, None)


def log_refusal(
    store: Store, rates: Rates, scope: Scope, status: int, reason: str, person: str | None
) -> None:
    """Note a refused request in the audit log, at most some a minute from one client; never fails."""
    client = client_of(scope)
    log.warning("refused %s %s from %s: %d %s", scope["method"], scope["path"][:200], client, status, reason)
    if not rates.allows_log(client):
        return
    payload = {"path": scope["path"][:200], "status": status, "reason": reason[:300]}
    if person is not None:
        payload["annotator"] = person
    try:
        store.log(person or "nobody", EventType.REQUEST_REFUSED, payload)
    except FeedbackError as error:
        log.warning("the refusal is not in the audit log: %s", error)


def client_of(scope: Scope) -> str:
    return scope["client"][0] if scope.get("client") else "unknown"


def same_origin(scope: Scope, headers: Headers) -> bool:
    """Whether a browser made this request from a page of this host. Programs send neither header."""
    site = headers.get("sec-fetch-site", "same-origin")
    origin = headers.get("origin")
    if site not in ("same-origin", "none"):
        return False
    return origin is None or urlsplit(origin).netloc == headers.get("host", "")


def _cookie(headers: Headers, name: str) -> str:
    from starlette.requests import cookie_parser

    return cookie_parser(headers.get("cookie", "")).get(name, "")


def counted(receive: Receive, most: int) -> Receive:
    """`receive` that stops a body without a length, or with a false one, at `most` bytes."""
    total = 0

    async def counting() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > most:
            raise HTTPException(413, f"The body is larger than {most} bytes.")
        return message

    return counting


def with_headers(send: Send, scope: Scope) -> Send:
    """`send` that adds `HEADERS` to every answer, and says that nothing but static files may be kept."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
            if scope["path"].startswith("/static/"):
                headers.setdefault("Cache-Control", "public, max-age=3600")
            else:
                headers["Cache-Control"] = "no-store"
        await send(message)

    return sending
