"""The decoding thread: one model, one request at a time, a bounded line of waiting ones."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from nemo_bard.evaluation.responder import Answer, answers_of
from nemo_bard.generation.decode import StepRecord
from nemo_bard.generation.settings import BardGenerationConfig
from nemo_bard.serving.server.errors import ApiError, Cancelled
from nemo_bard.serving.server.metrics import Metrics


@dataclass(kw_only=True, eq=False)
class Job:
    """A request on its way through the decoding thread."""

    batch: Any
    """What the processor returned for it."""
    config: BardGenerationConfig
    seed: int | None
    """Of the random numbers; None draws one."""
    end_ids: frozenset[int]
    """Ids that end a response."""
    on_block: Callable[[list[int]], bool]
    """Called in the decoding thread with the tokens of a block; returns whether to go on."""
    on_step: Callable[[StepRecord], None] | None = None
    """Called in the decoding thread with each step; decoding is slower with it on CUDA."""
    may_stop: bool = False
    """Whether ``on_block`` may say no; decoding is slower with it on CUDA."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set by whoever wants it to end."""

    def check(self) -> None:
        """Raise ``Cancelled`` if nobody waits for it any more."""
        if self.cancelled.is_set():
            raise Cancelled


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """What decoding a job gave."""

    answer: Answer
    """Of everything that was decoded, a cut by a stop string not regarded."""
    forwards: int
    """Forwards of the language model, the prompt's included."""
    seconds: dict[str, float]
    """Of vision, prefill and decode."""
    is_at_end: bool
    """Whether an end token ended it."""


class BlockStreamer:
    """Hands blocks of a job on, and stops it between blocks."""

    def __init__(self, job: Job) -> None:
        self.job, self.prompt_seen = job, False
        self.last: list[int] = []
        """Tokens of the last finished block, up to its end."""
        self.goes_on = True

    def put(self, ids: torch.Tensor) -> None:
        """Take the prompt, then each finished block."""
        self.job.check()
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.last = ids.tolist()
        self.goes_on = self.job.on_block(self.last)

    def end(self) -> None:
        """Nothing more comes."""


class StepStreamer(BlockStreamer):
    """Hands steps on too, and stops a job between steps."""

    def put_step(self, record: StepRecord) -> None:
        """Take a denoising step."""
        self.job.check()
        if self.job.on_step is not None:
            self.job.on_step(record)


class DecodingThread:
    """Runs jobs one after the other.

    Args:
        model: ``BardVLForConditionalGeneration``.
        processor: Its processor.
        max_queue: Jobs that may wait beside the one that runs.
        metrics: Counts them.
    """

    def __init__(self, model: Any, processor: Any, max_queue: int, metrics: Metrics) -> None:
        self.model, self.processor, self.max_queue, self.metrics = model, processor, max_queue, metrics
        self.executor = ThreadPoolExecutor(1, "nemo-bard-decode")
        self.admitted = 0
        self.running = 0
        self.jobs: set[Job] = set()
        self.last_seconds = 1.0
        metrics.running.set_function(lambda: self.running)
        metrics.waiting.set_function(lambda: self.admitted - self.running)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place in the line; called in the event loop.

        Raises:
            ApiError: 429 if the line is full.
        """
        if self.admitted > self.max_queue:
            wait = max(1, round(self.last_seconds * self.admitted))
            raise ApiError(
                429,
                f"{self.admitted} requests are being answered or waiting, and --max-queue is {self.max_queue};"
                f" try again in {wait} s",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(wait)},
            )
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1

    async def run(self, job: Job) -> JobResult:
        """Decode a job; a caller that is cancelled cancels it.

        Raises:
            Cancelled: If it was.
        """
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self.executor, self._decode, job)
        self.jobs.add(job)
        try:
            return await future
        finally:
            job.cancelled.set()
            self.jobs.discard(job)

    def close(self) -> None:
        """End the running job at its next step or block, refuse the waiting ones, and wait for the thread."""
        for job in self.jobs:
            job.cancelled.set()
        self.executor.shutdown(wait=True, cancel_futures=True)

    def _decode(self, job: Job) -> JobResult:
        job.check()
        self.running = 1
        try:
            return self._generate(job)
        finally:
            self.running = 0

    def _generate(self, job: Job) -> JobResult:
        device = self.model.device
        # Looking at each step costs nothing where no CUDA graph is given up for it.
        kind = StepStreamer if job.on_step is not None or device.type == "cpu" else BlockStreamer
        streamer = kind(job)
        generator = None
        if job.config.temperature > 0:
            generator = torch.Generator(device)
            generator.manual_seed(job.seed) if job.seed is not None else generator.seed()
        output = self.model.generate(
            job.batch.to(device),
            generation_config=job.config.updated(return_dict_in_generate=True),
            streamer=streamer,
            generator=generator,
            stopping_criteria=(lambda ids, scores: not streamer.goes_on) if job.may_stop else None,
        )
        answer = answers_of(output, self.processor)[0]
        self.last_seconds = sum(output.seconds.values())
        return JobResult(
            answer=answer,
            forwards=output.forwards,
            seconds=output.seconds,
            is_at_end=streamer.last[-1] in job.end_ids,
        )
