"""``/v1/chat/completions``: one request from its arrival to its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from nemo_bard.base.errors import one_line
from nemo_bard.serving.server.answer import DONE, AnswerForm, numbers_of, sse, step_of, usage_of
from nemo_bard.serving.server.chat import Prepared, Preparer
from nemo_bard.serving.server.errors import ApiError, Cancelled, error_body
from nemo_bard.serving.server.intake import Intake, check_key
from nemo_bard.serving.server.metrics import Metrics
from nemo_bard.serving.server.settings import ServerSettings
from nemo_bard.serving.server.text import ResponseText
from nemo_bard.serving.server.worker import DecodingThread, Job, JobResult

logger = logging.getLogger(__name__)

CLIENT_GONE = 499
"""What metrics call a request whose client went away."""


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
        status = 500
        try:
            await self._answer(Request(scope, receive), receive, send)
            status = 200
        except ApiError as error:
            status = error.status
            raise
        except Cancelled:
            status = CLIENT_GONE
            self.metrics.cancelled.inc()
        finally:
            self.metrics.requests.labels(str(status)).inc()

    async def _answer(self, request: Request, receive: Receive, send: Send) -> None:
        arrived = time.perf_counter()
        check_key(request, self.settings.api_key)
        with self.intake.room() as mine, self.thread.place():
            raw = await self.intake.read(request, mine)
            run = _Run(self, arrived)
            work = asyncio.create_task(run.work(raw, self._patient(send)))
            gone = asyncio.create_task(_gone(receive))
            try:
                await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
                run.cancelled = gone.done()
                if run.job is not None and gone.done():
                    run.job.cancelled.set()
                await work
            finally:
                gone.cancel()
                work.cancel()

    def _patient(self, send: Send) -> Send:
        """Sending that leaves a client that reads nothing."""

        async def patient(message: Any) -> None:
            try:
                await asyncio.wait_for(send(message), self.settings.stall_seconds)
            except TimeoutError as error:
                raise Cancelled from error

        return patient


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Run:
    """One request behind its body."""

    def __init__(self, endpoint: Completions, arrived: float) -> None:
        self.thread, self.preparer, self.metrics = endpoint.thread, endpoint.preparer, endpoint.metrics
        self.arrived, self.form = arrived, AnswerForm(endpoint.preparer.name)
        self.cancelled = False
        self.job: Job | None = None
        self.events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        """What is to be streamed; None at the end."""

    async def work(self, raw: bytes, send: Send) -> None:
        prepared = await asyncio.to_thread(self.preparer.prepare, raw)
        del raw
        text = ResponseText(self.preparer.processor.tokenizer, prepared.asked.stop)
        self.job = self._job(prepared, text)
        if self.cancelled:
            self.job.cancelled.set()
        decoding = asyncio.create_task(self.thread.run(self.job))
        decoding.add_done_callback(lambda _: self.events.put_nowait(None))
        try:
            if prepared.asked.stream:
                await self._stream(prepared, text, decoding, send)
            else:
                await self._whole(prepared, text, decoding, send)
        finally:
            self.job.cancelled.set()
            if not decoding.done():
                with contextlib.suppress(Cancelled):
                    await decoding

    def _job(self, prepared: Prepared, text: ResponseText) -> Job:
        loop = asyncio.get_running_loop()

        def say(event: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(self.events.put_nowait, event)

        started = False

        def on_block(ids: list[int]) -> bool:
            nonlocal started
            if not started:
                started = True
                self.metrics.first_block.observe(time.perf_counter() - self.arrived)
            if prepared.asked.stream:
                say(self.form.chunk({"content": text.add(ids)}))
            else:
                text.add(ids)
            return text.stopped_by is None

        return Job(
            batch=prepared.batch,
            config=prepared.config,
            seed=prepared.asked.seed,
            end_ids=frozenset(prepared.settings.end_ids),
            on_block=on_block,
            on_step=self._on_step(prepared, say) if prepared.drafts and prepared.asked.stream else None,
            may_stop=bool(prepared.asked.stop),
        )

    def _on_step(self, prepared: Prepared, say: Callable[[dict[str, Any]], None]) -> Callable[[Any], None]:
        tokenizer, settings = self.preparer.processor.tokenizer, prepared.settings
        visible: list[bool] = []

        def on_step(record: Any) -> None:
            if record.step == 0:
                visible[:] = [False] * settings.block_size
            say(self.form.extension({"draft": step_of(record, visible, tokenizer, settings.mask_token_id)}))

        return on_step

    async def _whole(self, prepared: Prepared, text: ResponseText, decoding: asyncio.Task[JobResult], send: Send) -> None:
        pieces = await decoding
        text.finish()
        answer = self._text(text)
        usage = self._count(prepared, text, pieces)
        value = self.form.whole(answer, _finish(text, pieces), usage)
        if prepared.drafts:
            value["bard"] = numbers_of(pieces)
        body = json.dumps(value, ensure_ascii=False).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
