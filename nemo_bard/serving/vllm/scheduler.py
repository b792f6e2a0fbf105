# pyright: reportMissingImports=false
"""Scheduling: a canvas is scheduled whole, and chunks of a prompt end where blocks end."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.diffusion_scheduler import DiffusionAsyncScheduler  # pyright: ignore[reportMissingImports]

from nemo_bard.serving.vllm.edges import keep_edges
from nemo_bard.serving.vllm.hashing import BlockHasher
from nemo_bard.upstream.vllm import keep_unfinished, rehash
from nemo_bard.upstream.vllm_scheduler import ChunkingScheduler


class WholeBlocks(ChunkingScheduler):
    """What both schedulers below have in common."""

    def __init__(self, vllm_config: Any, **kwargs: Any) -> None:
        """Prepare hashing.

        Args:
            vllm_config: vLLM's settings.
            **kwargs: What vLLM gives to a scheduler.
        """
        super().__init__(vllm_config, **kwargs)
        keep_unfinished(self.kv_cache_manager)  # the last block of an answer is not committed
        self.hf_config = vllm_config.model_config.hf_config
        self.is_block_context = self.hf_config.context_attention == "block"
        if self.is_block_context and self.max_num_encoder_input_tokens:
            # A block may hold the end of one picture and the beginning of the next, and needs both; the budget of a step holds any picture.
            self.widen_encoder_cache(self.max_num_encoder_input_tokens + self.hf_config.block_size)
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

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; requests that wait for one another are sent back, all but the first.

        With block context a request holds a picture until the block with the picture's end is computed, and if that needs another
        picture it waits for room. Several may do so, each with what the others need.
        """
        output = super().schedule(*args, **kwargs)
        is_idle = not (output.total_num_scheduled_tokens or any(one.num_in_flight_tokens for one in self.running))
        if self.is_block_context and is_idle:
            self.send_back(self.running[1:])
        return output

    def chunk(self, request: Any, begin: int, size: int) -> int:
        """Tokens of a request in the next step: as many as vLLM would take, or fewer, so that blocks stay whole."""
        if begin >= request.num_tokens:  # a canvas: whole or not at all, unless the context ends
            return size if size >= min(self.num_spec_tokens, self.max_model_len - begin) else 0
        if not self.is_block_context or begin + size >= request.num_tokens:
            return size
        return max(keep_edges(request, self.hf_config).last(begin + size) - begin, 0)


class BardScheduler(WholeBlocks):
    """Without async scheduling."""


class BardAsyncScheduler(WholeBlocks, DiffusionAsyncScheduler):
    """With async scheduling."""


def make_scheduler(vllm_config: Any, **kwargs: Any) -> WholeBlocks:
    """What vLLM is given as ``scheduler_cls``: which one it is, is known late."""
    kind = BardAsyncScheduler if vllm_config.scheduler_config.async_scheduling else BardScheduler
    return kind(vllm_config=vllm_config, **kwargs)
