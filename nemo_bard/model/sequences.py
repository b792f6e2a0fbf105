"""Attention within the sequences that lie one behind another in one row: the frames of the vision tower."""

from __future__ import annotations

import functools
import itertools
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from nemo_bard.upstream.torch import to_device_without_waiting

logger = logging.getLogger(__name__)

KERNEL_DTYPES = (torch.float16, torch.bfloat16)
KERNEL_HEAD_MULTIPLE = 8
KERNEL_MAX_HEAD = 256
KERNEL_CAPABILITY = (8, 0)
"""Of the GPU; FlashAttention needs Ampere or later."""


class Sequences(NamedTuple):
    """``S`` sequences in a row of ``T`` tokens; lengths are known to the host, so that nobody has to ask the device."""

    starts: Tensor
    """Where each starts, and the end of the last, ``[S + 1]`` int32 on the device of the tokens."""
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> Sequences:
        """Sequences of these lengths, for tokens on ``device``."""
        starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        return cls(to_device_without_waiting(starts, device), lengths)


def sequence_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each sequence: one kernel for all of them where there is one, else one after another.

    Args:
        module: The attention layer.
        query: ``[1, H, T, D]``; so are ``key`` and ``value``.
        key: See ``query``.
        value: See ``query``.
        sequences: Where they lie.
        scaling: Factor on the scores, ``1 / sqrt(D)`` if None.
        dropout: Dropout probability; the kernel has none.
        **kwargs: Passed on to transformers' ``sdpa``.

    Returns:
        ``[1, T, H, D]`` and None.
    """
    if query.is_cuda and dropout == 0.0:
        reason = _why_not_kernel(query.dtype, query.shape[-1], query.device)
        if reason is None:
            q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
            starts, longest = sequences.starts, max(sequences.lengths)
            out = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling)
            assert isinstance(out, Tensor)
            return out.unsqueeze(0), None
        _tell(reason)
    parts = (x.split(sequences.lengths, dim=2) for x in (query, key, value))
    outs = [
        sdpa_attention_forward(module, *part, attention_mask=None, scaling=scaling, dropout=dropout, **kwargs)[0]
        for part in zip(*parts, strict=True)
    ]
    return torch.cat(outs, dim=1), None


def _why_not_kernel(dtype: torch.dtype, head: int, device: torch.device) -> str | None:
    """Why FlashAttention does not take these tensors on CUDA; None if it does."""
    if dtype not in KERNEL_DTYPES:
        return f"it computes in {str(dtype).removeprefix('torch.')}, not in bfloat16 or float16"
    if head % KERNEL_HEAD_MULTIPLE or head > KERNEL_MAX_HEAD:
        return f"its heads have {head} values, not a multiple of {KERNEL_HEAD_MULTIPLE} up to {KERNEL_MAX_HEAD}"
    if torch.cuda.get_device_capability(device) < KERNEL_CAPABILITY:
        return "the GPU is older than FlashAttention needs"
    return None


@functools.cache
def _tell(reason: str) -> None:
    """Say once for each reason."""
    logger.warning("the vision tower attends image by image, not in one kernel, because %s", reason)
