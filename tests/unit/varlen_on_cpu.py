"""What stands in on a CPU for the kernels of ``torch.nn.attention.varlen``, and asks of its arguments what they ask."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


def _check(query: Tensor, key: Tensor, value: Tensor, offsets: tuple[Tensor | None, ...]) -> None:
    if query.dtype not in (torch.float16, torch.bfloat16) or not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"FlashAttention only support fp16 and bf16 data type, got {query.dtype}, {key.dtype}")
    if query.shape[-1] % 8 or query.shape[-1] > 256:
        raise RuntimeError(f"head_size must be a multiple of 8 and at most 256, got {query.shape[-1]}")
    if any(x.stride(-1) != 1 for x in (query, key, value)):
        raise RuntimeError("Input tensor must have contiguous last dimension")
    for x in offsets:
        if x is not None and (x.dtype != torch.int32 or not x.is_contiguous()):
            raise RuntimeError(f"cu_seqlens must have dtype int32 and be contiguous, got {x.dtype}")


def _paged(pool: Tensor, block_table: Tensor | None, row: int) -> Tensor:
    return pool if block_table is None else pool[block_table[row].long()].flatten(0, 1)


def _allowed(queries: int, keys: int, causal: bool, window: list[int]) -> Tensor:
    """Which keys a query sees ``[queries, keys]``; both ends are aligned."""
    left, right = window[0], 0 if causal else window[1]
    distance = torch.arange(keys).unsqueeze(0) - (torch.arange(queries).unsqueeze(1) + keys - queries)
    allowed = torch.ones(queries, keys, dtype=torch.bool)
    if left >= 0:
        allowed &= distance >= -left
    if right >= 0:
        allowed &= distance <= right
    return allowed


class _Options(NamedTuple):
    """Arguments of the forward after the lengths."""

    is_causal: bool = False
    scale: float | None = None
    window_size: list[int] | None = None
    enable_gqa: bool = False
    seqused_k: Tensor | None = None
    block_table: Tensor | None = None
    num_splits: int | None = None


def varlen_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``torch_attn::_varlen_attn``; rows of ``query`` in no sequence give 0."""
    is_causal, scale, window_size, enable_gqa, seqused_k, block_table, _ = _Options(*args, **kwargs)
    _check(query, key, value, (cu_seq_q, cu_seq_k, seqused_k, block_table))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    groups = query.shape[1] // value.shape[-2]
    assert enable_gqa or groups == 1
    starts_q = cu_seq_q.tolist()
    starts_k = None if cu_seq_k is None else cu_seq_k.tolist()
    out, log_sums = torch.zeros_like(query), torch.zeros(query.shape[1], query.shape[0])
    for row, (start, stop) in enumerate(zip(starts_q, starts_q[1:], strict=False)):
        keys, values = _paged(key, block_table, row), _paged(value, block_table, row)
        first, last = (0, len(keys)) if starts_k is None or block_table is not None else starts_k[row : row + 2]
        if seqused_k is not None:
            last = first + int(seqused_k[row])
        if stop - start > max_q or last - first > max_k:
            raise RuntimeError(f"sequence {row} has {stop - start} queries and {last - first} keys: {max_q}, {max_k}")
        if stop == start or last == first:
            continue
        q, k, v = (x.float().transpose(0, 1) for x in (query[start:stop], keys[first:last], values[first:last]))
        k, v = (x.repeat_interleave(groups, 0) for x in (k, v))
        allowed = _allowed(stop - start, last - first, is_causal, window_size or [-1, -1])
        scores = ((q @ k.transpose(1, 2)) * scale).masked_fill(~allowed, float("-inf"))
        log_sums[:, start:stop] = scores.logsumexp(-1)
        out[start:stop] = (scores.softmax(-1).nan_to_num() @ v).transpose(0, 1).to(out.dtype)
    return out, log_sums, torch.zeros(2, dtype=torch.uint64)


def varlen_forward_out(out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As ``torch_attn::_varlen_attn_out``."""
    made, log_sums, _ = varlen_forward(*args, **kwargs)
    out.copy_(made)
    return log_sums


def varlen_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``torch_attn::_varlen_attn_backward``, without grouped heads."""
    max_q, max_k, is_causal, _, scale, window_size = (*args, None, None)[:6]
    _check(query, key, value, (cu_seq_q, cu_seq_k))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    starts_q, starts_k = cu_seq_q.tolist(), cu_seq_k.tolist()
    grads = tuple(torch.zeros_like(x) for x in (query, key, value))
    for row in range(len(starts_q) - 1):
        rows, columns = slice(*starts_q[row : row + 2]), slice(*starts_k[row : row + 2])
        if rows.stop - rows.start > max_q or columns.stop - columns.start > max_k:
            raise RuntimeError(f"sequence {row} is longer than {max_q}, {max_k}")
        q, k, v, made, grad = (
            x[part].float().transpose(0, 1)
            for x, part in ((query, rows), (key, columns), (value, columns), (out, rows), (grad_out, rows))
        )
        allowed = _allowed(q.shape[1], k.shape[1], is_causal, window_size or [-1, -1])
        scores = ((q @ k.transpose(1, 2)) * scale).masked_fill(~allowed, float("-inf"))
        weights = (scores - lse[:, rows].unsqueeze(-1)).exp()
        of_scores = weights * (grad @ v.transpose(1, 2) - (grad * made).sum(-1, keepdim=True)) * scale
        pieces = (of_scores @ k, of_scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ grad)
        for total, part, piece in zip(grads, (rows, columns, columns), pieces, strict=True):
            total[part] = piece.transpose(0, 1).to(total.dtype)
    return grads
