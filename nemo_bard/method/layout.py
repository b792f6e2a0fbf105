"""Geometry of a block-diffusion sample: response spans, block ids, attention masks (torch only).

Training and decoding both call these functions, so they cannot disagree about who sees whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor

ContextAttention = Literal["block", "causal"]
CONTEXT_ATTENTIONS: tuple[str, ...] = ("block", "causal")
CONTEXT = 0
NOISY = 1
PADDING = -1
IGNORE_INDEX = -100
"""Label of a token that is not supervised."""


class TokenIds(NamedTuple):
    """What the attention mask is a function of; every field has the same shape ``[..., L]`` int64."""

    sample: Tensor
    """Sample of a packed row; ``-1`` (``PADDING``) attends to nothing and is attended by nothing."""
    branch: Tensor
    """``CONTEXT`` (prefix and clean responses) or ``NOISY``."""
    block: Tensor
    """Block within the sample; a noisy copy carries the block ids of its clean response."""
    order: Tensor
    """Position in the sequence, strictly increasing within a sample's context."""


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """What a training row holds besides its context and one noisy copy of each response."""

    anchor_block_size: int | None = None
    """Block size of a second model (a distillation anchor) that reads the same row. The clean tokens that its noisy tokens
    see are laid out as well. It knows no blocks behind a response's end: no decoding gets there, so that it has nothing to
    teach about them."""
    noisy_copies: int = 1
    """Noisy copies of each supervised response, side by side. Copies do not see each other, by their block ids alone: with
    ``n`` copies, block ``b`` is ``n b + n - 1`` in the context and ``n b + n - 1 - c`` in copy ``c``, so that a copy has
    its own ids and still sees exactly the context of blocks before ``b``."""
    next_token: bool = False
    """Also predict the supervised responses from the context, token by token: their clean tokens are laid out up to the
    last one, and ``next_response`` says where."""

    def __post_init__(self) -> None:
        assert self.noisy_copies >= 1


PLAIN_ROW = RowOptions()


@dataclass(frozen=True, kw_only=True)
class SampleLayout:
    """The training row of one sample, ``[context | noisy copies]``; every tensor is ``[L]``.

    ``source`` indexes the context token whose id a token carries (a noisy token's clean token), ``-1`` for response
    padding. ``offset`` is how far a token's position lies behind that of ``source`` (or, for padding, behind that of the
    response's last token): 0 except on padding.
    """

    source: Tensor
    offset: Tensor
    branch: Tensor
    block: Tensor
    response: Tensor
    """Index of the supervised response for noisy tokens, ``-1`` for context."""
    padding: Tensor
    """True on noisy tokens after the response's true end."""
    anchor_block: Tensor | None = None
    """Block under the anchor's block size; ``PADDING`` on noisy tokens in whose block the response has ended already."""
    next_response: Tensor | None = None
    """Supervised response whose token comes next, for context tokens; ``-1`` elsewhere. None unless asked for."""

    def __len__(self) -> int:
        return self.source.numel()


def check_block_size(block_size: int | None) -> None:
    """Raise ValueError unless ``block_size`` is an integer >= 1."""
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be an integer >= 1, got {block_size!r}")


def check_anchor_block_size(block_size: int | None, anchor_block_size: int | None) -> None:
    """Raise ValueError unless an anchor with this block size can teach a student with ``block_size``."""
    check_block_size(block_size)
    check_block_size(anchor_block_size)
    assert block_size is not None
    assert anchor_block_size is not None
    if block_size % anchor_block_size:
        raise ValueError(
            f"the anchor's block size must be at most the student's {block_size} and divide it, got {anchor_block_size}"
        )


def find_responses(
    input_ids: Tensor, assistant_header_ids: Sequence[int] | None, end_ids: Sequence[int]
) -> list[tuple[int, int]]:
    r"""Find the assistant responses of a tokenised conversation.

    A response starts after the assistant header (``<|im_start|>assistant\n``) and runs up to and including the first
    end token; the last one may be open (then it ends with the sequence). A header with nothing behind it, which is how
    a generation prompt ends, is no response.

    Args:
        input_ids: Token ids, ``[S]`` int64.
        assistant_header_ids: Ids of the header; None or empty means that no response can be found.
        end_ids: Ids that end a response.

    Returns:
        Half-open spans ``(start, end)`` in order.
    """
    if not assistant_header_ids:
        return []
    header = torch.as_tensor(list(assistant_header_ids), dtype=input_ids.dtype, device=input_ids.device)
    width, length = header.numel(), input_ids.numel()
    if length <= width:
        return []
    starts = (input_ids.unfold(0, width, 1) == header).all(-1).nonzero().flatten() + width
    if starts.numel() == 0:
        return []
    is_end = torch.isin(input_ids, torch.as_tensor(list(end_ids), dtype=input_ids.dtype, device=input_ids.device))
    ends = is_end.nonzero().flatten().tolist()
    spans: list[tuple[int, int]] = []
    cursor = 0
    for start in starts.tolist():
        if start < cursor or start >= length:
            continue
        end = next((e + 1 for e in ends if e >= start), length)
        spans.append((start, end))
        cursor = end
    return spans


def check_responses(length: int, responses: Sequence[tuple[int, int]]) -> None:
    """Raise ValueError unless the spans are non-empty, ordered, disjoint and inside ``[0, length)``."""
    cursor = 0
    for start, end in responses:
        if not cursor <= start < end <= length:
            raise ValueError(
                f"response spans must be ordered, disjoint and inside {length} tokens, got {list(responses)}"
            )
        cursor = end


def context_block_ids(length: int, responses: Sequence[tuple[int, int]], block_size: int) -> Tensor:
    """Block ids of a context of ``length`` tokens.

    The count restarts at the start and at the end of each response, so every such region begins a new block and its
    last block may be short. The block that a new response would begin with after this context is
    ``next_block(length, responses, block_size)``.

    Args:
        length: Number of context tokens ``S``.
        responses: Half-open response spans in order.
        block_size: Tokens per block.

    Returns:
        ``[S]`` int64, non-decreasing, starting at 0.

    Raises:
        ValueError: If ``block_size`` < 1 or the spans are not ordered, disjoint and inside the context.
    """
    check_block_size(block_size)
    check_responses(length, responses)
    cuts = sorted({0, length, *(edge for span in responses for edge in span)})
    parts, base = [], 0
    for start, end in zip(cuts[:-1], cuts[1:], strict=True):
        parts.append(base + torch.arange(end - start) // block_size)
        base += -(-(end - start) // block_size)
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def next_block(length: int, responses: Sequence[tuple[int, int]], block_size: int) -> int:
    """Block id of the first token of a response that follows a context of ``length`` tokens."""
    ids = context_block_ids(length, responses, block_size)
    return int(ids[-1]) + 1 if length else 0


def sample_layout(
    length: int,
    responses: Sequence[tuple[int, int]],
    block_size: int,
    *,
    supervised: Sequence[int] | None = None,
    drop_last_clean_block: bool = True,
    options: RowOptions = PLAIN_ROW,
) -> SampleLayout:
    """Lay one conversation out as ``[context | noisy copies of the supervised responses]``.

    Padding of a response exists in its noisy copy only: nothing supervised ever sees clean padding. For the same reason
    the last clean block of the last supervised response is not laid out, nor anything behind it, unless
    ``drop_last_clean_block`` is False.

    Args:
        length: Number of context tokens ``S``.
        responses: Half-open response spans in order.
        block_size: Tokens per block.
        supervised: Indices into ``responses`` that get a noisy copy; all if None.
        drop_last_clean_block: Leave out context tokens that no supervised token sees.
        options: What the row holds besides.

    Returns:
        The layout; its noisy part is ``options.noisy_copies * sum(ceil(len / B) * B)`` tokens long.

    Raises:
        ValueError: If there is no supervised response or not that many, ``block_size`` < 1, it is no multiple of
            ``options.anchor_block_size``, or the spans are wrong.
    """
    anchor_block_size, noisy_copies = options.anchor_block_size, options.noisy_copies
    if anchor_block_size is not None:
        check_anchor_block_size(block_size, anchor_block_size)
    smallest = anchor_block_size or block_size
    anchor_blocks = context_block_ids(length, responses, smallest)
    blocks = context_block_ids(length, responses, block_size)
    chosen = list(range(len(responses))) if supervised is None else sorted(set(supervised))
    if not chosen:
        raise ValueError("a training sample needs at least one assistant response")
    if chosen[0] < 0 or chosen[-1] >= len(responses):
        raise ValueError(f"supervised must index the {len(responses)} responses, got {list(supervised or ())}")
    last_start, last_end = responses[chosen[-1]]
    kept = last_start + (last_end - last_start - 1) // smallest * smallest if drop_last_clean_block else length
    if options.next_token:
        kept = max(kept, last_end)
    source, offset = [torch.arange(kept)], [torch.zeros(kept, dtype=torch.int64)]
    block, response = [blocks[:kept]], [torch.full((kept,), -1)]
    anchor_block = [anchor_blocks[:kept]]
    copy = [torch.zeros_like(offset[0])]
    for index, number in product(chosen, range(noisy_copies)):
        start, end = responses[index]
        size = end - start
        padded = -(-size // block_size) * block_size
        position = torch.arange(padded)
        source.append(torch.where(position < size, start + position, -1))
        offset.append((position - (size - 1)).clamp_min(0))
        block.append(blocks[start] + position // block_size)
        has_begun = position // smallest * smallest < size
        anchor_block.append(torch.where(has_begun, anchor_blocks[start] + position // smallest, PADDING))
        response.append(torch.full((padded,), index))
        copy.append(torch.full((padded,), number))
    response_ids = torch.cat(response)
    source_ids = torch.cat(source)
    shift = noisy_copies - 1 - torch.cat(copy)
    block_ids, anchor_ids = torch.cat(block) * noisy_copies + shift, torch.cat(anchor_block)
    return SampleLayout(
        source=source_ids,
        offset=torch.cat(offset),
        branch=(response_ids >= 0).long() * NOISY,
        block=block_ids,
        response=response_ids,
        padding=source_ids < 0,
        anchor_block=None
        if anchor_block_size is None
        else torch.where(anchor_ids == PADDING, PADDING, anchor_ids * noisy_copies + shift),
        next_response=_next_responses(responses, chosen, len(source_ids)) if options.next_token else None,
    )


def _next_responses(responses: Sequence[tuple[int, int]], chosen: Sequence[int], length: int) -> Tensor:
    """Response whose token comes next, ``[length]``; a token at the very start has nothing before it."""
    out = torch.full((length,), -1)
    for index in chosen:
        start, end = responses[index]
        out[max(start - 1, 0) : end - 1] = index
    return out


def attention_mask(query: TokenIds, key: TokenIds, *, context_attention: str = "block") -> Tensor:
    """Who may attend to whom (BARD, arXiv 2604.16514; ``causal`` after Fast-dVLM, arXiv 2604.06832).

    - ``block``: a context query sees context keys of its own and earlier blocks; ``causal``: context keys that do not
      come later in ``order``.
    - A noisy query sees context keys of earlier blocks and noisy keys of its own block.
    - Nobody sees another sample, and a context query never sees a noisy key.

    Args:
        query: Ids of the queries, each ``[..., Q]``.
        key: Ids of the keys, each ``[..., K]``.
        context_attention: ``block`` or ``causal``.

    Returns:
        Bool ``[..., Q, K]``, True where attention is allowed. Rows of padding are all False.

    Raises:
        ValueError: If ``context_attention`` is unknown.
    """
    q, k = TokenIds(*(x.unsqueeze(-1) for x in query)), TokenIds(*(x.unsqueeze(-2) for x in key))
    return may_attend(q, k, context_attention=context_attention)


def may_attend(q: TokenIds, k: TokenIds, *, context_attention: str = "block") -> Tensor:
    """``attention_mask`` element by element: may the query ``q`` attend to the key ``k``?

    Args:
        q: Ids of queries; any shape, also none.
        k: Ids of keys; broadcast against ``q``.
        context_attention: ``block`` or ``causal``.

    Returns:
        Bool of the common shape.

    Raises:
        ValueError: If ``context_attention`` is unknown.
    """
    check_context_attention(context_attention)
    same = (q.sample == k.sample) & (q.sample != PADDING)
    key_is_context, query_is_noisy = k.branch == CONTEXT, q.branch == NOISY
    earlier = k.block <= q.block if context_attention == "block" else k.order <= q.order
    from_context = ~query_is_noisy & key_is_context & earlier
    from_noisy = query_is_noisy & torch.where(key_is_context, k.block < q.block, k.block == q.block)
    return same & (from_context | from_noisy)


def check_context_attention(context_attention: str) -> None:
    """Raise ValueError unless ``context_attention`` is one of ``CONTEXT_ATTENTIONS``."""
    if context_attention not in CONTEXT_ATTENTIONS:
        raise ValueError(f"context_attention must be one of {', '.join(CONTEXT_ATTENTIONS)}, got {context_attention!r}")
