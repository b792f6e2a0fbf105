"""A block-causal prompt as a set of sequences: what its tokens see, with no mask of queries by keys."""

from __future__ import annotations

import torch

from nemo_bard.generation.prefix import Prefix, Sequences
from nemo_bard.generation.prompt import Prompt


def prompt_prefix(
    prompt: Prompt, size: int, capacity: int, *, is_causal: bool, device: torch.device, kernel: bool
) -> Prefix:
    """What the tokens of ``[prompt | masks | padding]`` see: a set of sequences, one for each block of each prompt.

    Args:
        prompt: The prompts.
        size: Masks behind each, ``B``.
        capacity: Columns of the cache.
        is_causal: Whether prompt tokens see nothing that comes later.
        device: Where the result goes.
        kernel: Whether the kernel for sequences takes it.
    """
    width = prompt.input_ids.shape[1] + size
    visible, context, others = [], _Collected(), _Collected()
    for row, sizes in enumerate(prompt.block_sizes):
        length = sum(sizes)
        ends = torch.tensor(sizes).cumsum(0)
        seen = torch.arange(length) + 1 if is_causal else ends.repeat_interleave(torch.tensor(sizes))
        padding = width - length - size
        visible.append(torch.cat([seen, torch.full((size,), length + size), torch.ones(padding, dtype=torch.int64)]))
        begin, start = row * width, row * capacity
        if is_causal:
            context.add(begin, length, start, length)
        else:
            for block, end in zip(sizes, ends.tolist(), strict=True):
                others.add(begin + end - block, block, start, end)
        others.add(begin + length, size, start, length + size)
        if padding:
            others.add(begin + length + size, padding, start, 1)
    sequences = []
    if kernel and is_causal:
        sequences = [context.sequences(device, causal=True, some=True), others.sequences(device, some=True)]
    elif kernel:
        sequences = [others.sequences(device)]
    columns = torch.arange(width, device=device).expand(len(visible), -1)
    return Prefix(
        columns=columns,
        visible=torch.stack(visible).to(device, non_blocking=True),
        width=max(prompt.lengths) + size,
        capacity=capacity,
        sequences=sequences,
    )


class _Collected:
    """Sequences of queries, one after the other."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, int, int]] = []

    def add(self, begin: int, queries: int, start: int, used: int) -> None:
        """Add the ``queries`` from flat index ``begin`` on, which see ``used`` columns of a row that begins at ``start``."""
        self.rows.append((begin, queries, start, used))

    def sequences(self, device: torch.device, *, causal: bool = False, some: bool = False) -> Sequences:
        """All of them; ``some`` if there are other queries too."""
        begins, sizes, starts, used = torch.tensor(self.rows).unbind(1)
        edges = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        queries = None
        if some:
            queries = (
                begins.repeat_interleave(sizes) + torch.arange(int(edges[-1])) - edges[:-1].repeat_interleave(sizes)
            )
            queries = queries.to(device, non_blocking=True)
        edges, starts, used = (
            x.int().to(device, non_blocking=True) for x in (edges, torch.cat([starts, starts[-1:]]), used)
        )
        longest = int(sizes.max())
        return Sequences(edges=edges, starts=starts, used=used, longest=longest, causal=causal, queries=queries)
