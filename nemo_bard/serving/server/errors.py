"""Errors as OpenAI's clients read them."""

from __future__ import annotations

from typing import Any

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """Ends a request with a status and one line.

    Args:
        status: HTTP status, 4xx or 5xx.
        message: One line.
        param: The key of the request that is meant.
        code: OpenAI's code, such as ``model_not_found``.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """What goes to the client."""
        return error_body(self.status, self.message, param=self.param, code=self.code)


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object.

    Args:
        status: HTTP status.
        message: One line.
        param: The key of the request that is meant.
        code: OpenAI's code.
    """
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Cancelled(Exception):
    """Ends the decoding of a request whose client has gone."""
