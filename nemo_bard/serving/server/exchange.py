"""One request behind its body: prepared, decoded, and told to the client as a whole or block by block."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

from starlette.types import Send

from nemo_bard.base.errors import one_line
from nemo_bard.generation.decode import StepRecord
from nemo_bard.serving.server.answer import DONE, EXTENSION, AnswerForm, numbers_of, sse, step_of, usage_of
from nemo_bard.serving.server.chat import Prepared, Preparer
from nemo_bard.serving.server.errors import ApiError, Cancelled, error_body
from nemo_bard.serving.server.metrics import Metrics
from nemo_bard.serving.server.text import ResponseText
from nemo_bard.serving.server.worker import DecodingThread, Job, JobResult

Say = Callable[[dict[str, Any]], None]


class Exchange:
    """One request.

    Args:
        thread: Decodes.
        preparer: Checks and encodes.
        metrics: Counts.
        arrived: ``time.perf_counter`` of its arrival.
    """

    def __init__(self, thread: DecodingThread, preparer: Preparer, metrics: Metrics, arrived: float) -> None:
        self.thread, self.preparer, self.metrics, self.arrived = thread, preparer, metrics, arrived
        self.tokenizer = preparer.processor.tokenizer
        self.form = AnswerForm(preparer.first.name)
        self.cancelled = threading.Event()
        self.events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        """What is to be streamed; None at the end."""

    def cancel(self) -> None:
        """End it at the next step or block."""
        self.cancelled.set()

    async def run(self, raw: bytes, send: Send) -> None:
        """Answer.

        Args:
            raw: The body.
            send: Of ASGI.

        Raises:
            ApiError: Before anything was sent.
            Cancelled: If it was.
        """
        prepared = await asyncio.to_thread(self.preparer.prepare, raw)
        self.form.model = prepared.served.name
        text = ResponseText(self.tokenizer, prepared.asked.stop)
        decoding = asyncio.ensure_future(self.thread.run(self._job(prepared, text)))
        decoding.add_done_callback(lambda _: self.events.put_nowait(None))
        answer = self._stream if prepared.asked.stream else self._whole
        try:
            await answer(prepared, text, decoding, send)
        finally:
            self.cancel()
            await asyncio.wait([decoding])  # its place in the line is taken until then
            if not decoding.cancelled():
                decoding.exception()

    def _job(self, prepared: Prepared, text: ResponseText) -> Job:
        loop = asyncio.get_running_loop()
        stream = prepared.asked.stream

        def say(event: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(self.events.put_nowait, event)

        def on_block(ids: list[int]) -> bool:
            if not text.ids:
                self.metrics.first_block.observe(time.perf_counter() - self.arrived)
            new = text.add(ids)
            if stream and new:
                say(self.form.chunk({"content": new}))
            return text.stopped_by is None

        return Job(
            batch=prepared.batch,
            config=prepared.config,
            seed=prepared.asked.seed,
            end_ids=frozenset(prepared.settings.end_ids),
            on_block=on_block,
            on_step=self._on_step(prepared, say) if prepared.drafts and stream else None,
            may_stop=bool(prepared.asked.stop),
            cancelled=self.cancelled,
        )

    def _on_step(self, prepared: Prepared, say: Say) -> Callable[[StepRecord], None]:
        size = prepared.settings.block_size
        visible = [False] * size

        def on_step(record: StepRecord) -> None:
            if record.step == 0:
                visible[:] = [False] * size
            step = step_of(record, visible, self.tokenizer, prepared.settings)
            say(self.form.extension({"step": step, "prompt_tokens": prepared.prompt_tokens}))

        return on_step

    async def _whole(
        self, prepared: Prepared, text: ResponseText, decoding: asyncio.Future[JobResult], send: Send
    ) -> None:
        result = await decoding
        text.finish()
        value = self.form.whole(text.text, finish_reason(text, result), self._count(prepared, text, result))
        if prepared.drafts:
            value[EXTENSION] = {"numbers": numbers_of(result)}
        body = json.dumps(value, ensure_ascii=False).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(
        self, prepared: Prepared, text: ResponseText, decoding: asyncio.Future[JobResult], send: Send
    ) -> None:
        async def write(*pieces: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": b"".join(pieces), "more_body": more})

        event = await self.events.get()
        if decoding.done() and event is None:
            await decoding  # what went wrong before anything was sent has a status of its own
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await write(sse(self.form.chunk({"role": "assistant", "content": ""})))
        while event is not None:
            await write(sse(event))
            event = await self.events.get()
        try:
            result = await decoding
        except Cancelled:
            raise
        except Exception as error:
            status, message = (error.status, error.message) if isinstance(error, ApiError) else (500, one_line(error))
            await write(sse(error_body(status, message)), DONE, more=False)
            raise
        await write(*self._last_pieces(prepared, text, result), DONE, more=False)

    def _last_pieces(self, prepared: Prepared, text: ResponseText, result: JobResult) -> list[bytes]:
        pieces = [self.form.chunk({"content": rest})] if (rest := text.finish()) else []
        pieces.append(self.form.chunk({}, finish_reason(text, result)))
        usage = self._count(prepared, text, result)
        if prepared.drafts:
            pieces.append(self.form.extension({"numbers": numbers_of(result)}))
        if prepared.asked.include_usage:
            pieces.append(self.form.usage(usage))
        return [sse(piece) for piece in pieces]

    def _count(self, prepared: Prepared, text: ResponseText, result: JobResult) -> dict[str, Any]:
        metrics = self.metrics
        metrics.prompt_tokens.inc(prepared.prompt_tokens)
        metrics.response_tokens.inc(text.num_tokens)
        metrics.forwards.inc(result.forwards)
        metrics.decode_seconds.observe(sum(result.seconds.values()))
        metrics.tokens_per_forward.observe(result.answer.tpf)
        return usage_of(prepared.prompt_tokens, text.num_tokens)


def finish_reason(text: ResponseText, result: JobResult) -> str:
    """OpenAI's word for what ended a response: ``stop`` (an end token or a stop string) or ``length``."""
    return "stop" if text.stopped_by is not None or result.is_at_end else "length"
