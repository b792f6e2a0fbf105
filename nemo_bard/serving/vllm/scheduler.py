"""Scheduling: a canvas is scheduled whole, and chunks of a prompt end where blocks end."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.diffusion_scheduler import DiffusionAsyncScheduler, DiffusionScheduler

from nemo_bard.serving.vllm.edges import keep_edges
from nemo_bard.serving.vllm.hashing import BlockHasher
from nemo_bard.upstream.vllm import rehash


class WholeBlocks(DiffusionScheduler):
    """What both schedulers below have in common."""

    def __init__(self, vllm_config: Any, **kwargs: Any) -> None:
        """Prepare hashing.

        Args:
            vllm_config: vLLM's settings.
            **kwargs: What vLLM gives to a scheduler.
        """
        super().__init__(vllm_config, **kwargs)
        self.hf_config = vllm_config.model_config.hf_config
        self.is_block_context = self.hf_config.context_attention == "block"
        self.hasher = BlockHasher(
            self.hf_config,
            page_size=self.hash_block_size,
            algorithm=vllm_config.cache_config.prefix_caching_hash_algo,
        )

    def add_request(self, request: Any) -> None:
        """Take a request; its tokens are hashed in our way."""
        if self.is_block_context:
            rehash(request, self.hasher)
        super().add_request(request)

    def _reserve_prefill_lookahead(self, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        """Tokens of a request in the next step: as many as vLLM would take, or fewer, so that blocks stay whole."""
        size = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        end = num_computed_tokens + size
        if num_computed_tokens >= request.num_tokens:  # a canvas: whole or not at all, unless the context ends
            room = self.max_model_len - num_computed_tokens
            return size if size >= min(self.num_spec_tokens, room) else 0
        if not self.is_block_context or end >= request.num_tokens:
            return size
        return max(keep_edges(request, self.hf_config).last(end) - num_computed_tokens, 0)


class BardScheduler(WholeBlocks):
    """Without async scheduling."""


class BardAsyncScheduler(WholeBlocks, DiffusionAsyncScheduler):
    """With async scheduling."""


def make_scheduler(vllm_config: Any, **kwargs: Any) -> WholeBlocks:
    """What vLLM is given as ``scheduler_cls``: which one it is, is known late."""
    kind = BardAsyncScheduler if vllm_config.scheduler_config.async_scheduling else BardScheduler
    return kind(vllm_config=vllm_config, **kwargs)
