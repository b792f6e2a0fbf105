# pyright: reportMissingImports=false
"""Private methods of vLLM's scheduler: how much of a request is in the next step, and a request sent back. Imports vLLM."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.diffusion_scheduler import DiffusionScheduler  # pyright: ignore[reportMissingImports]


class ChunkingScheduler(DiffusionScheduler):
    """vLLM's scheduler for diffusion models, with a public method in the private one's place."""

    def chunk(self, request: Any, begin: int, size: int) -> int:
        """Tokens of a request in the next step.

        Args:
            request: vLLM's.
            begin: Tokens that it has in the cache.
            size: Tokens that vLLM would take.

        Returns:
            As many or fewer; 0 leaves the request out of the step.
        """
        del request, begin
        return size

    def send_back(self, requests: Sequence[Any]) -> None:
        """Preempt running requests: they give up what they hold and begin anew later.

        Args:
            requests: vLLM's; in the order in which they run.
        """
        now = time.monotonic()
        for request in reversed(requests):
            self.running.remove(request)
            self._preempt_request(request, now)

    def widen_encoder_cache(self, by: int) -> None:
        """Let outputs of the vision tower for so many more tokens be kept; call it before any request comes."""
        manager = self.encoder_cache_manager
        manager.cache_size += by
        manager.num_free_slots += by
        manager.num_freeable_slots += by

    def _reserve_prefill_lookahead(self, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        size = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        return self.chunk(request, num_computed_tokens, size)
