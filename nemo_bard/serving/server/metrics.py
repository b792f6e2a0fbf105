"""What ``/metrics`` tells, as Prometheus reads it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
RATIOS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        room = {"namespace": "nemo_bard", "registry": self.registry}
        self.requests = Counter(
            "requests", "Requests of chat completions by status, 499 those whose client went away", ["status"], **room
        )
        self.prompt_tokens = Counter("prompt_tokens", "Prompt tokens, images included", **room)
        self.response_tokens = Counter("response_tokens", "Response tokens, end tokens included", **room)
        self.forwards = Counter("forwards", "Forwards of the language model, prompts included", **room)
        self.waiting = Gauge("requests_waiting", "Requests that wait for the decoding thread", **room)
        self.running = Gauge("requests_running", "Requests that are being decoded", **room)
        self.first_block = Histogram(
            "time_to_first_block_seconds", "From a request's arrival to its first block", buckets=SECONDS, **room
        )
        self.decode_seconds = Histogram(
            "request_seconds", "Seconds of vision, prompt and decoding of a request", buckets=SECONDS, **room
        )
        self.tokens_per_forward = Histogram(
            "tokens_per_forward", "Response tokens per denoising forward of a request", buckets=RATIOS, **room
        )

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)
