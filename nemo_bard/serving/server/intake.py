"""Reading a request: its key, its kind, and its body with limits of size and time."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request

from nemo_bard.serving.server.errors import ApiError, Cancelled
from nemo_bard.serving.server.settings import ServerSettings

BODIES = 4
"""Bodies of the largest size that may be in memory together."""


def check_key(request: Request, api_key: str | None) -> None:
    """Check the bearer token, in a time that tells nothing about it.

    Raises:
        ApiError: 401 if it is missing or wrong.
    """
    if api_key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(given.strip().encode(), api_key.encode())
    if scheme.lower() != "bearer" or not right:
        raise ApiError(
            401,
            "this server wants its API key as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


class Intake:
    """Reads bodies.

    Args:
        settings: Limits.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.held = 0
        """Bytes of the bodies that are in memory."""

    @contextmanager
    def room(self) -> Iterator[list[int]]:
        """Count what a request holds for as long as it does; the list's entry is its bytes."""
        mine = [0]
        try:
            yield mine
        finally:
            self.held -= mine[0]

    async def read(self, request: Request, mine: list[int]) -> bytes:
        """Read a body to its end.

        Args:
            request: Not yet read.
            mine: From ``room``.

        Raises:
            ApiError: 415 if it is no JSON, 413 if it is too large, 408 if nothing came for too long, 429 if others fill
                the memory for bodies.
            Cancelled: If the client has gone.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what pages of other origins cannot send unasked
            raise ApiError(415, f"content-type must be application/json, got {kind[:60]!r}")
        length = request.headers.get("content-length", "")
        if length.isascii() and length.isdigit() and len(length) < 19:
            self._check(int(length))
        pieces: list[bytes] = []
        more = True
        while more:
            try:
                message = await asyncio.wait_for(request.receive(), self.settings.stall_seconds)
            except TimeoutError as error:
                seconds = self.settings.stall_seconds
                raise ApiError(408, f"nothing came for {seconds:g} s", headers={"Connection": "close"}) from error
            if message["type"] == "http.disconnect":
                raise Cancelled
            piece, more = message.get("body", b""), message.get("more_body", False)
            mine[0] += len(piece)
            self.held += len(piece)
            self._check(mine[0])
            if self.held > BODIES * self.settings.max_body:
                message = "other requests are being read; try again in 1 s"
                raise ApiError(429, message, headers={"Retry-After": "1", "Connection": "close"})
            pieces.append(piece)
        return b"".join(pieces)

    def _check(self, size: int) -> None:
        most = self.settings.max_body
        if size > most:
            message = f"the body has {size} bytes or more, at most {most} are taken here (--max-body)"
            raise ApiError(413, message, headers={"Connection": "close"})
