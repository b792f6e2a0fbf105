"""The engines of next-token decoding: forwards that verify tokens and draft blocks behind them.

A forward holds, for every row, ``[clean tokens | masks | masks | ...]``. The clean tokens (the last one that is certain, and the
draft behind it) see what comes before them, so that the logits behind each of them are those of the next token. A segment of
``B`` masks stands behind the first so many of them: it sees these, everything before, and itself, as a block of the training row
does. Rows accept different numbers of tokens and so have cursors of their own.

- ``CausalEngine``: a cache written in place, one forward for all of it, the LM head where it is wanted.
- ``PlainCausalEngine``: the oracle. Every forward runs the whole response anew, segments have forwards of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from nemo_bard.generation.prefix import NAME as PREFIX_ATTENTION
from nemo_bard.generation.prefix import Prefix, PrefixCache
from nemo_bard.generation.products import TURNED
from nemo_bard.generation.strategies import NextTokenStrategy
from nemo_bard.method.layout import CONTEXT, NOISY, PADDING, TokenIds, attention_mask

if TYPE_CHECKING:
    from nemo_bard.generation.resolve import DecodeSettings
    from nemo_bard.generation.session import Session


class Verdict(NamedTuple):
    """What a forward says of ``N`` rows."""

    logits: Tensor
    """Of the token behind each clean token, ``[N, M, V]``; of the prompt's forward ``[N, 1, V]``."""
    draft: Callable[[Tensor], Tensor]
    """Logits ``[N, B, V]`` of the segment with this number, ``[N]`` int64."""


class VerifyingEngine(Protocol):
    """Runs the forwards of one batch; the loop decides what is accepted."""

    forwards: int
    """Forwards of the language model so far, the prompt's included."""

    def first(self, *, with_draft: bool) -> Verdict:
        """Run the prompt, with a segment behind it if ``with_draft``."""
        ...

    def step(self, clean: Tensor, ends: Tensor) -> Verdict:
        """Run clean tokens and segments.

        Args:
            clean: The tokens behind the accepted ones, ``[N, M]`` int64; what stands behind a row's own is of no meaning.
            ends: Behind how many of these each segment stands, ``[N, K]`` int64, at least 1; ``K`` may be 0.
        """
        ...

    def accept(self, tokens: Sequence[Sequence[int]]) -> None:
        """Keep the first clean tokens of each row, those of the last step that are given; the others are forgotten."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
        ...


def num_drafts(settings: DecodeSettings) -> int:
    """How many blocks a forward drafts; blocks of one token hold nothing to draft."""
    strategy = settings.strategy
    assert isinstance(strategy, NextTokenStrategy)
    return strategy.num_drafts if settings.block_size > 1 else 0


class CausalEngine:
    """One forward for everything, with a cache."""

    attention: ClassVar[str] = PREFIX_ATTENTION
    layers = TURNED

    def __init__(self, session: Session) -> None:
        self.session, self.model, self.settings = session, session.model, session.settings
        prompt, settings = session.prompt, session.settings
        rows, self.width = prompt.input_ids.shape
        self.device = prompt.input_ids.device
        self.real, self.position = prompt.real, prompt.next_position
        self.base = [self.width] * rows
        """Columns of each row that are filled for good."""
        room = settings.given.max_new_tokens + settings.block_size * (1 + num_drafts(settings))
        self.cache = PrefixCache(
            self.model.config.text_config.num_hidden_layers, rows, self.width + max(room, settings.block_size)
        )
        self.offsets = torch.arange(settings.block_size, device=self.device)
        self.forwards = 0

    def first(self, *, with_draft: bool) -> Verdict:
        """See ``VerifyingEngine``."""
        prompt, width = self.session.prompt, self.width
        size = self.settings.block_size if with_draft else 0
        ids = torch.nn.functional.pad(prompt.input_ids, (0, size), value=self.settings.mask_token_id)
        behind = (self.position.unsqueeze(1) + self.offsets[:size]).expand(3, -1, -1)
        positions = torch.cat([prompt.position_ids, behind], 2)
        column = torch.arange(width + size, device=self.device)
        sees = column.unsqueeze(0) <= column.unsqueeze(1)
        sees[width:, width:] = True
        mask = sees & self._is_real(width + size)
        mask |= torch.eye(
            width + size, dtype=torch.bool, device=self.device
        )  # padding sees itself, so that it is finite
        hidden = self._forward(ids, positions, column.expand(len(ids), -1), mask, **self.session.vision_arguments())
        return self._verdict(hidden[:, width - 1 :], 1, size)

    def step(self, clean: Tensor, ends: Tensor) -> Verdict:
        """See ``VerifyingEngine``."""
        rows, length = clean.shape
        size, segments = self.settings.block_size, ends.shape[1]
        base = torch.tensor(self.base, device=self.device).unsqueeze(1)
        masks = clean.new_full((rows, segments * size), self.settings.mask_token_id)
        inner = (ends.unsqueeze(2) + self.offsets).flatten(1)
        offset = torch.cat([torch.arange(length, device=self.device).expand(rows, -1), inner], 1)
        positions = (self.position + base.squeeze(1) - self.width).unsqueeze(1) + offset
        columns = base + torch.arange(length + segments * size, device=self.device)
        column = torch.arange(max(self.base) + columns.shape[1], device=self.device)
        # a clean token sees the columns up to its own; a mask those before its segment's place, and its own segment
        context = base + torch.cat([offset[:, :length] + 1, ends.repeat_interleave(size, 1)], 1)
        mask = column < context.unsqueeze(2)
        own = torch.arange(segments, device=self.device).repeat_interleave(size) * size
        begin = (base + length + own).unsqueeze(2)
        mask[:, length:] |= (column >= begin) & (column < begin + size)
        mask &= self._is_real(len(column))
        hidden = self._forward(torch.cat([clean, masks], 1), positions.expand(3, -1, -1), columns, mask)
        return self._verdict(hidden, length, size)

    def _is_real(self, width: int) -> Tensor:
        """Columns that are no padding, ``[N, 1, width]`` bool."""
        return torch.nn.functional.pad(self.real, (0, width - self.width), value=True).unsqueeze(1)

    def _forward(self, ids: Tensor, positions: Tensor, columns: Tensor, mask: Tensor, **vision: Any) -> Tensor:
        self.forwards += 1
        prefix = Prefix(
            columns=columns,
            visible=columns,
            width=mask.shape[2],
            capacity=self.cache.capacity,
            mask=mask.unsqueeze(1),
        )
        self.cache.prefix = prefix
        return self.model.model(
            input_ids=ids,
            attention_mask=None,
            position_ids=positions,
            past_key_values=self.cache,
            prefix=prefix,
            **vision,
        )[0]

    def _verdict(self, hidden: Tensor, length: int, size: int) -> Verdict:
        head = self.model.lm_head

        def draft(segment: Tensor) -> Tensor:
            index = (length + segment.unsqueeze(1) * size + self.offsets).unsqueeze(2).expand(-1, -1, hidden.shape[2])
            return head(hidden.gather(1, index).flatten(0, 1)).unflatten(0, (-1, size))

        return Verdict(head(hidden[:, :length].flatten(0, 1)).unflatten(0, (-1, length)), draft)

    def accept(self, tokens: Sequence[Sequence[int]]) -> None:
        """See ``VerifyingEngine``."""
        self.base = [base + len(one) for base, one in zip(self.base, tokens, strict=True)]

    def select(self, rows: Tensor) -> None:
        """See ``VerifyingEngine``."""
        self.base = [self.base[row] for row in rows.tolist()]
        self.real, self.position = self.real[rows], self.position[rows]
        self.cache.select(rows)


class PlainCausalEngine:
    """Separate forwards, logits everywhere, and a cache of the prompt alone."""

    def __init__(self, session: Session) -> None:
        self.session, self.settings = session, session.settings
        prompt = session.prompt
        self.width, self.device = prompt.input_ids.shape[1], prompt.input_ids.device
        self.rows = list(range(len(prompt.input_ids)))
        """Rows of the batch that are left; forwards run all of them."""
        self.accepted: list[list[int]] = [[] for _ in self.rows]
        self.context = prompt.ids._replace(block=torch.zeros_like(prompt.ids.block))
        self.cache = DynamicCache()
        self.forwards = 0

    def first(self, *, with_draft: bool) -> Verdict:
        """See ``VerifyingEngine``."""
        del with_draft
        prompt, nothing = self.session.prompt, [[] for _ in self.rows]
        vision = self.session.vision_arguments()
        logits = self._forward(prompt.input_ids, prompt.position_ids, self.context, self.context, **vision)
        return Verdict(logits[:, -1:], lambda _: self._behind(nothing, self.settings.block_size))

    def step(self, clean: Tensor, ends: Tensor) -> Verdict:
        """See ``VerifyingEngine``."""
        behind = clean.tolist()

        def draft(segment: Tensor) -> Tensor:
            at = ends.gather(1, segment.unsqueeze(1)).squeeze(1).tolist()
            return self._behind([row[:end] for row, end in zip(behind, at, strict=True)], self.settings.block_size)

        return Verdict(self._behind(behind, 0), draft)

    def _behind(self, behind: Sequence[Sequence[int]], masks: int) -> Tensor:
        """Run ``[accepted | behind | masks]``; logits of the masks, or where there are none, of what is ``behind``."""
        tails = list(self.accepted)
        for row, more in zip(self.rows, behind, strict=True):
            tails[row] = [*tails[row], *more]
        longest = max(len(tail) for tail in tails)
        filled = [[*tail, *[0] * (longest - len(tail)), *[self.settings.mask_token_id] * masks] for tail in tails]
        ids = torch.tensor(filled, device=self.device)
        sizes = torch.tensor([len(tail) for tail in tails], device=self.device).unsqueeze(1)
        column = torch.arange(longest + masks, device=self.device).expand(len(tails), -1)
        is_noisy = column >= longest
        order = torch.where(is_noisy, column - longest + sizes, column)
        sample = torch.where(~is_noisy & (column >= sizes), PADDING, 0)
        query = TokenIds(sample, torch.where(is_noisy, NOISY, CONTEXT), is_noisy.long(), order + self.width)
        keys = TokenIds(*(torch.cat(pair, 1) for pair in zip(self.context, query, strict=True)))
        positions = (self.session.prompt.next_position.unsqueeze(1) + order).expand(3, -1, -1)
        logits = self._forward(ids, positions, query, keys)
        self.cache.crop(-ids.shape[1])
        rows = torch.tensor(self.rows, device=self.device)
        if masks:
            return logits[rows, -masks:]
        begin = torch.tensor([len(self.accepted[row]) for row in self.rows], device=self.device).unsqueeze(1)
        return logits[rows.unsqueeze(1), begin + torch.arange(len(behind[0]), device=self.device)]

    def _forward(self, ids: Tensor, positions: Tensor, query: TokenIds, keys: TokenIds, **vision: Any) -> Tensor:
        self.forwards += 1
        mask = attention_mask(query, keys, context_attention="causal").unsqueeze(1)
        return self.session.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, **vision
        ).logits

    def accept(self, tokens: Sequence[Sequence[int]]) -> None:
        """See ``VerifyingEngine``."""
        for row, more in zip(self.rows, tokens, strict=True):
            self.accepted[row] = [*self.accepted[row], *more]

    def select(self, rows: Tensor) -> None:
        """See ``VerifyingEngine``."""
        self.rows = [self.rows[row] for row in rows.tolist()]
