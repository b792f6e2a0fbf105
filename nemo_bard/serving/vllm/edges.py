"""Where the blocks of a request end: in its prompt as training counts them, behind it every ``B`` tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nemo_bard.method.layout import context_block_ids, find_responses
from nemo_bard.serving.vllm.config import ServedBardVLConfig, end_ids


class Edges:
    """Ends of blocks, as numbers of tokens from the start of the request."""

    def __init__(self, prompt_ids: Sequence[int], hf_config: ServedBardVLConfig) -> None:
        """Find the blocks of a prompt.

        Args:
            prompt_ids: Token ids of the prompt, without any response tokens.
            hf_config: The model's configuration.
        """
        assert hf_config.block_size is not None
        assert hf_config.served_defaults is not None
        self.block_size, self.length = hf_config.block_size, len(prompt_ids)
        _, ends = end_ids(hf_config, hf_config.served_defaults)
        responses = find_responses(torch.tensor(prompt_ids), hf_config.assistant_header_ids, ends)
        blocks = context_block_ids(self.length, responses, self.block_size).numpy()
        self.ends = np.append(np.flatnonzero(blocks[1:] != blocks[:-1]) + 1, self.length)

    def last(self, position: int) -> int:
        """The last edge at or before a position; 0 if there is none."""
        if position >= self.length:
            return self.length + (position - self.length) // self.block_size * self.block_size
        index = int(np.searchsorted(self.ends, position, side="right"))
        return int(self.ends[index - 1]) if index else 0

    def next(self, position: int) -> int:
        """The first edge at or behind a position."""
        if position > self.length:
            return self.length - (self.length - position) // self.block_size * self.block_size
        return int(self.ends[np.searchsorted(self.ends, position)])

    def between(self, begin: int, end: int) -> np.ndarray:
        """The edges in ``(begin, end]``, ascending int64."""
        inside = self.ends[(self.ends > begin) & (self.ends <= end)]
        if end <= self.length:
            return inside
        skipped = max(begin - self.length, 0) // self.block_size
        first = self.length + (skipped + 1) * self.block_size
        return np.concatenate([inside, np.arange(first, end + 1, self.block_size)])


def segments(
    edges: Sequence[Edges | None], begin: Sequence[int], size: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut the rows of a batch into sequences of one block each, which see all that comes before them and themselves.

    Args:
        edges: Of each row, None for a row that stays whole.
        begin: Tokens that each row has in the cache.
        size: Tokens of each row in this batch.

    Returns:
        For each sequence: its row, its tokens, and the tokens of the row behind it in this batch; int64, int32, int32.
    """
    rows, sizes, behind = [], [], []
    for row, (known, first, count) in enumerate(zip(edges, begin, size, strict=True)):
        end = int(first) + int(count)
        ends = np.array([end]) if known is None else known.between(int(first), end)
        assert len(ends), f"chunk {first} to {end} holds no whole block"
        assert ends[-1] == end, f"chunk {first} to {end} ends within a block"
        rows.append(np.full(len(ends), row))
        sizes.append(np.diff(ends, prepend=int(first)))
        behind.append(end - ends)
    return (
        np.concatenate(rows).astype(np.int64),
        np.concatenate(sizes).astype(np.int32),
        np.concatenate(behind).astype(np.int32),
    )


def keep_edges(request: Any, hf_config: ServedBardVLConfig) -> Edges:
    """The edges of a request of vLLM's scheduler, found once."""
    found = getattr(request, "bard_edges", None)
    if found is None or found.length != request.num_prompt_tokens:
        found = Edges(list(request.all_token_ids[: request.num_prompt_tokens]), hf_config)
        request.bard_edges = found
    return found
