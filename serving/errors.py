"""What a client is told when a request is not answered, in OpenAI's form."""

from __future__ import annotations

from typing import Any

RETRY_SECONDS = 2


class ApiError(Exception):
    """An expected refusal. `param` is the key that is wrong, where it is one."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else {}

    def body(self) -> dict[str, Any]:
        return error_body(self.status, self.message, self.param, self.code)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    # Half a surrogate pair, which JSON can carry in, is no text that could go out.
    message = message.encode("utf-8", "replace").decode()
    param = param.encode("utf-8", "replace").decode() if param else param
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A request whose key `param` breaks a rule."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def stopping() -> ApiError:
    return ApiError(503, "the server is shutting down; ask again", code="shutting_down")
