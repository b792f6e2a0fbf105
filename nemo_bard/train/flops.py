"""FLOPs of a training step, counted from its batches: the doubled layout, what the mask lets attend, and the images."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_bard.cost.count import Flops, peak_flops, row_flops
from nemo_bard.method.layout import CONTEXT, PADDING

if TYPE_CHECKING:
    from nemo_bard.model.configuration import BardVLConfig


def count_pairs(batch: Mapping[str, Tensor], context_attention: str) -> int:
    """Number of (query, key) pairs that may attend in a batch, without its ``[L, L]`` mask.

    Equal to the sum of ``layout.attention_mask``: a group of tokens with one block sees the context blocks before it and
    itself.

    Args:
        batch: ``sample_ids``, ``branch_ids`` and ``block_ids``, each ``[N, L]``.
        context_attention: ``block`` or ``causal``.
    """
    samples = batch["sample_ids"]
    rows = torch.arange(len(samples), device=samples.device).unsqueeze(1).expand_as(samples)
    # context comes first, so that a sample's blocks of context are known when its noisy tokens come
    ids = torch.stack([rows, samples, batch["branch_ids"], batch["block_ids"]], -1)[samples != PADDING]
    groups, sizes = ids.unique(dim=0, return_counts=True)
    total, sample, blocks, sums = 0, None, [], [0]
    for (row, number, branch, block), size in zip(groups.tolist(), sizes.tolist(), strict=True):
        if (row, number) != sample:
            sample, blocks, sums = (row, number), [], [0]
        before = sums[-1 if branch == CONTEXT else bisect_left(blocks, block)]
        if branch == CONTEXT:
            blocks.append(block)
            sums.append(before + size)
        if branch == CONTEXT and context_attention == "causal":
            total += size * before + size * (size + 1) // 2
        else:
            total += size * (before + size)
    return total


def _predicting(batch: Mapping[str, Any]) -> int:
    """Context tokens that predict the next one."""
    return int((batch["ar_response_ids"] >= 0).sum()) if "ar_response_ids" in batch else 0


def batch_flops(config: BardVLConfig, batches: Iterable[Mapping[str, Any]]) -> Flops:
    """FLOPs of one forward over corrupted microbatches, those of their real tokens.

    Args:
        config: The model.
        batches: What the collator made, after corruption.
    """
    total = Flops(text=0.0, attention=0.0, head=0.0, vision=0.0)
    for batch in batches:
        grids = batch["image_grid_thw"]
        frames = [int(height * width) for time, height, width in grids.tolist() for _ in range(int(time))]
        total += row_flops(
            config,
            tokens=int((batch["sample_ids"] != PADDING).sum()),
            pairs=count_pairs(batch, config.context_attention),
            supervised=int(batch["loss_mask"].sum()) + _predicting(batch),
            frames=frames,
        )
    return total


def utilisation(flops: float, seconds: float, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What is logged of a GPU's work: TFLOP/s, and their part of its peak where that is known.

    Args:
        flops: FLOPs that it did; recomputation and row padding do not count.
        seconds: Time that it took, > 0.
        device: Where.
        dtype: What it computed in.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    peak = peak_flops(name, str(dtype).removeprefix("torch.")) if name else None
    return {"tflops_per_gpu": flops / seconds / 1e12, **({"mfu": flops / seconds / peak} if peak else {})}
