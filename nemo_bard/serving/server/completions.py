"""``/v1/chat/completions``: a request from its arrival to its end."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from nemo_bard.serving.server.chat import Preparer
from nemo_bard.serving.server.errors import ApiError, Cancelled
from nemo_bard.serving.server.exchange import Exchange
from nemo_bard.serving.server.intake import Intake, check_key
from nemo_bard.serving.server.metrics import Metrics
from nemo_bard.serving.server.settings import ServerSettings
from nemo_bard.serving.server.worker import DecodingThread

CLIENT_GONE = 499
"""What metrics call a request whose client went away."""
STOPPING = 503


class Completions:
    """The endpoint, an ASGI application.

    Args:
        thread: Decodes.
        preparer: Checks and encodes.
        settings: Limits.
        metrics: Counts.
    """

    def __init__(self, thread: DecodingThread, preparer: Preparer, settings: ServerSettings, metrics: Metrics) -> None:
        self.thread, self.preparer, self.settings, self.metrics = thread, preparer, settings, metrics
        self.intake = Intake(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        status, started = 500, False

        async def patient(message: Any) -> None:
            """Send, and leave a client that reads nothing."""
            nonlocal started
            started = True
            try:
                await asyncio.wait_for(send(message), self.settings.stall_seconds)
            except TimeoutError as error:
                raise Cancelled from error

        try:
            await self._answer(Request(scope, receive), receive, patient)
            status = 200
        except ApiError as error:
            status = error.status
            raise
        except asyncio.CancelledError as error:
            status = STOPPING
            if started:
                raise
            raise ApiError(status, "the server is stopping", headers={"Connection": "close"}) from error
        except Cancelled:
            status = CLIENT_GONE
        finally:
            self.metrics.requests.labels(str(status)).inc()

    async def _answer(self, request: Request, receive: Receive, send: Send) -> None:
        arrived = time.perf_counter()
        check_key(request, self.settings.api_key)
        with self.intake.room() as mine:
            raw = await self.intake.read(request, mine)
            with self.thread.place():
                exchange = Exchange(self.thread, self.preparer, self.metrics, arrived)
                gone = asyncio.create_task(_gone(receive))
                gone.add_done_callback(lambda _: exchange.cancel())
                try:
                    await exchange.run(raw, send)
                finally:
                    gone.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
