"""Clients of an OpenAI endpoint: answers streamed, when their pieces came, and what follows from that."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx2
import numpy as np
from _report import Row, one_line

SHOWN_UNEQUAL = 3
STEPS_COUNTER = "vllm:diffusion_num_denoising_steps_total"


# ------------------ answers ------------------
@dataclass
class Answer:
    """What came back for a request, and when; times in seconds of ``time.perf_counter``."""

    index: int
    """Place of the prompt."""
    start: float = 0.0
    end: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    """When pieces with text came."""
    text: str = ""
    finish: str | None = None
    tokens: int | None = None
    """Of the response, by the server's usage; None if it told none."""
    error: str | None = None

    @property
    def outcome(self) -> tuple[str, str | None]:
        """What has to be the same however many ask."""
        return self.text, self.finish


def check_status(status: int, body: bytes) -> None:
    """Raise ConnectionError with the server's own words unless it is 200."""
    if status == 200:
        return
    try:
        told = json.loads(body)
        told = told.get("error", told)
        message = told.get("message", told) if isinstance(told, dict) else told
    except (ValueError, AttributeError):
        message = body[:200].decode(errors="replace")
    raise ConnectionError(f"HTTP {status}: {message}")


def read_event(data: str, answer: Answer) -> bool:
    """Take an event of the stream; True if it was the last.

    Raises:
        ConnectionError: If the server tells of an error.
    """
    if data == "[DONE]":
        return True
    event = json.loads(data)
    if not isinstance(event, dict):
        raise ConnectionError(f"in the stream: {data[:200]}")
    if event.get("error"):
        raise ConnectionError(f"in the stream: {event['error']}")
    if event.get("usage"):
        answer.tokens = event["usage"].get("completion_tokens")
    for choice in event.get("choices") or ():
        if piece := (choice.get("delta") or {}).get("content"):
            answer.arrivals.append(time.perf_counter())
            answer.text += piece
        answer.finish = choice.get("finish_reason") or answer.finish
    return False


class Endpoint:
    """A server to ask.

    Args:
        url: Its address, with or without ``/v1``.
        api_key: Bearer token; none is sent if None.
        timeout: Seconds in which something has to come.
    """

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.timeout = timeout
        self.is_here = urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")

    def settings(self) -> dict[str, Any]:
        """Of a client: a proxy is not asked for a server on this machine."""
        return {"headers": self.headers, "timeout": self.timeout, "trust_env": not self.is_here}

    def get(self, path: str) -> httpx2.Response:
        """Answer of a GET.

        Raises:
            ConnectionError: If the server does not answer, or not with 200.
        """
        try:
            with httpx2.Client(**self.settings()) as client:
                found = client.get(self.url + path)
            check_status(found.status_code, found.content)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise ConnectionError(f"{self.url}{path}: {one_line(error)}") from error
        except ConnectionError as error:
            raise ConnectionError(f"{self.url}{path}: {error}") from error
        return found

    def models(self) -> list[str]:
        """Names of the served models.

        Raises:
            ConnectionError: If the server does not tell.
        """
        found = self.get("/v1/models")
        try:
            return [model["id"] for model in found.json()["data"]]
        except (ValueError, TypeError, KeyError) as error:
            raise ConnectionError(f"{self.url}/v1/models is no list of models: {found.text[:100]!r}") from error

    def version(self) -> str | None:
        """Version of vLLM's server; None of a server that does not tell."""
        try:
            return self.get("/version").json()["version"]
        except (ConnectionError, ValueError, TypeError, KeyError):
            return None

    def denoising_steps(self) -> float | None:
        """Denoising steps of all requests since the start, as vLLM counts them; None of another server."""
        try:
            lines = self.get("/metrics").text.splitlines()
        except ConnectionError:
            return None
        values = [line.rpartition(" ")[2] for line in lines if line.startswith(STEPS_COUNTER)]
        return sum(map(float, values)) if values else None

    async def ask(self, client: httpx2.AsyncClient, index: int, body: bytes) -> Answer:
        """Send a request and read its stream; what fails is in ``error``."""
        answer = Answer(index, start=time.perf_counter())
        try:
            headers = {"Content-Type": "application/json"}
            address = f"{self.url}/v1/chat/completions"
            async with client.sse(address, method="POST", content=body, headers=headers) as stream:
                if stream.response.status_code != 200:
                    check_status(stream.response.status_code, await stream.response.aread())
                done = False
                async for event in stream:
                    done = read_event(event.data, answer) or done
                if not done:
                    raise ConnectionError("the stream ended without [DONE]")
        except ConnectionError as error:
            answer.error = " ".join(str(error).split())
        except (httpx2.HTTPError, ValueError) as error:
            answer.error = one_line(error)
        answer.end = time.perf_counter()
        return answer


async def ask_all(
    endpoint: Endpoint, bodies: Sequence[bytes], order: Sequence[int], clients: int, tick: Callable[[], Any]
) -> list[Answer]:
    """Let clients ask, each its next request when its last one is answered.

    Args:
        endpoint: Whom.
        bodies: A request for each prompt.
        order: Prompts to ask, by index; in this order.
        clients: How many at once.
        tick: Called after each answer.

    Returns:
        Answers in the order of their ends.
    """
    waiting, answers = iter(order), []
    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)

    async def client_loop(client: httpx2.AsyncClient) -> None:
        for index in waiting:  # shared: an iterator gives each index to one client
            answers.append(await endpoint.ask(client, index, bodies[index]))
            tick()

    async with httpx2.AsyncClient(limits=limits, **endpoint.settings()) as client:
        await asyncio.gather(*(client_loop(client) for _ in range(min(clients, len(order)))))
    return answers


# ------------------ figures ------------------
def percentiles(name: str, seconds: Sequence[float]) -> Row:
    """Median and 99th percentile in milliseconds; nothing without values."""
    if not seconds:
        return {}
    p50, p99 = np.percentile(np.asarray(seconds) * 1000, [50, 99])
    return {f"{name}_p50_ms": float(p50), f"{name}_p99_ms": float(p99)}


def figures(answers: Sequence[Answer], count: Callable[[Answer], int]) -> Row:
    """Figures of a level.

    Args:
        answers: All of it, failed ones too; these count as errors and in nothing else.
        count: Response tokens of an answer.

    Raises:
        ConnectionError: If all of them failed.
    """
    good = [answer for answer in answers if answer.error is None]
    errors = [answer.error for answer in answers if answer.error is not None]
    if not good:
        raise ConnectionError(f"all {len(answers)} requests failed, the first with {errors[0]}")
    tokens = sum(count(answer) for answer in good)
    wall = max(answer.end for answer in answers) - min(answer.start for answer in answers)
    gaps = [late - soon for one in good for soon, late in zip(one.arrivals, one.arrivals[1:], strict=False)]
    return {
        "requests": len(answers),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
        "tokens": tokens,
        "wall_s": wall,
        "tokens_per_second": tokens / wall,
        "requests_per_second": len(good) / wall,
        "pieces": sum(len(one.arrivals) for one in good) / len(good),
        **percentiles("first", [one.arrivals[0] - one.start for one in good if one.arrivals]),
        **percentiles("between", gaps),
        **percentiles("latency", [one.end - one.start for one in good]),
    }


def compare(answers: Sequence[Answer], wanted: dict[int, Any], take: Callable[[Answer], Any], name: str) -> Row:
    """How many answers are as they should be.

    Args:
        answers: Of a level; failed ones are not compared.
        wanted: What each prompt's answer should be, by index.
        take: What of an answer is compared.
        name: Prefix of the keys.

    Returns:
        Numbers of compared and equal answers, and the first unequal ones.
    """
    pairs = [(one, wanted[one.index]) for one in answers if one.error is None and one.index in wanted]
    unequal = [(one, want) for one, want in pairs if take(one) != want]
    shown = [{"prompt": one.index, "wanted": want, "got": take(one)} for one, want in unequal[:SHOWN_UNEQUAL]]
    return {
        f"{name}_compared": len(pairs),
        f"{name}_equal": len(pairs) - len(unequal),
        **({f"{name}_unequal": shown} if shown else {}),
    }
