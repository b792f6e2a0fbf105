# pyright: reportMissingImports=false
"""The private method of vLLM's scheduler that decides how much of a request is in the next step. Imports vLLM."""

from __future__ import annotations

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

    def _reserve_prefill_lookahead(self, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        size = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        return self.chunk(request, num_computed_tokens, size)
