"""The engines: how logits at the wanted positions of a block come about.

- ``FastEngine``: a cache written in place, the LM head only at the wanted positions, and one forward for the commit of a
  block and the first step of the next one (``[block b clean | block b + 1 masked]`` under the training mask gives exactly
  the numbers of two forwards). The prompt's forward carries the first step of the first block in the same way.
- ``GraphEngine`` (``nemo_bard.generation.graph``): whole steps on the device, for CUDA.
- ``PlainEngine``: the oracle. Separate prompt and commit forwards, logits and softmax at every position, and a cache that
  is concatenated anew in every step.

An engine of another package is a class as ``Engine`` says (``BlockEngine`` keeps its books), registered in
``nemo_bard.generation.parameters.ENGINES``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from nemo_bard.generation.products import TURNED
from nemo_bard.generation.session import BlockCache, Session
from nemo_bard.method.layout import CONTEXT, NOISY, TokenIds, attention_mask


class Engine(Protocol):
    """Runs the forwards of one batch; the loop decides what is fixed.

    An engine is made with the call's session, which has the prompt, the settings and the model. ``canvas`` is the current block
    of the rows that are left, ``[rows, B]`` int64 with the mask id where a token is masked; ``positions`` ``[K]`` int64 are the
    flat indices into ``[rows * B]`` whose logits are wanted. Every call returns logits ``[K, V]``, which the loop may write to.
    """

    separate_commits: ClassVar[bool]
    """Whether ``advance`` spends a forward on the commit alone; statistics count it."""
    forwards: int
    """Forwards of the language model so far, the prompt's included."""
    # An engine may also have ``fixed_rows = True`` (``select`` is never called then), ``attention``, the name of the backend
    # that its view of the model has in place of the model's, and ``layers``, classes that take the place of others there.

    def __init__(self, session: Session) -> None: ...

    def first(self, canvas: Tensor, positions: Tensor) -> Tensor:
        """Run the prompt and the first step of the first block."""
        ...

    def step(self, canvas: Tensor, positions: Tensor) -> Tensor:
        """Run one more step of the current block."""
        ...

    def advance(self, finished: Tensor, canvas: Tensor, positions: Tensor) -> Tensor:
        """Commit the finished block and run the first step of the next one."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
        ...


class BlockEngine:
    """Books of an engine with a cache: block ids and positions of each row, ids of the cached columns."""

    separate_commits: ClassVar[bool] = False

    def __init__(self, session: Session) -> None:
        self.session = session
        self.model, self.prompt, self.settings = session.model, session.prompt, session.settings
        prompt = session.prompt
        self.block = prompt.next_block
        self.position = prompt.next_position
        self.committed = prompt.input_ids.shape[1]
        self.key_ids = prompt.ids
        self.forwards = 0

    def _block_ids(self, offset: int, branch: int) -> TokenIds:
        """Ids of the current (0) or a later block, each ``[N, B]``."""
        size = self.settings.block_size
        ones = torch.ones(self.block.shape[0], size, dtype=torch.int64, device=self.block.device)
        order = self.committed + offset * size + torch.arange(size, device=self.block.device)
        return TokenIds(ones * 0, ones * branch, (self.block + offset).unsqueeze(1) * ones, order * ones)

    def _block_positions(self, offset: int) -> Tensor:
        """M-RoPE positions of the current (0) or a later block, ``[3, N, B]``."""
        size = self.settings.block_size
        positions = self.position.unsqueeze(1) + offset * size + torch.arange(size, device=self.position.device)
        return positions.expand(3, *positions.shape)

    def _mask(self, query: TokenIds, new_keys: TokenIds) -> Tensor:
        keys = TokenIds(*(torch.cat(pair, 1) for pair in zip(self.key_ids, new_keys, strict=True)))
        return attention_mask(query, keys, context_attention=self.settings.context_attention).unsqueeze(1)

    def _commit_bookkeeping(self) -> None:
        clean = self._block_ids(0, CONTEXT)
        self.key_ids = TokenIds(*(torch.cat(pair, 1) for pair in zip(self.key_ids, clean, strict=True)))
        self.committed += self.settings.block_size
        self.block = self.block + 1
        self.position = self.position + self.settings.block_size

    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
        self.block, self.position = self.block[rows], self.position[rows]
        self.key_ids = TokenIds(*(x[rows] for x in self.key_ids))


class FastEngine(BlockEngine):
    """In-place cache, merged commits, LM head where wanted, products that suit a CPU."""

    separate_commits = False
    layers = TURNED

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        capacity = self.committed + self.settings.num_blocks * self.settings.block_size
        self.cache = BlockCache(self.model.config.text_config.num_hidden_layers, capacity)
        self.step_mask: Tensor | None = None

    def _forward(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor,
        start: int,
        wanted: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        self.forwards += 1
        self.cache.write_at(start)
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            output_positions=wanted,
            **kwargs,
        ).logits

    def _merged(
        self, clean: Tensor, clean_ids: TokenIds, clean_positions: Tensor, canvas: Tensor, offset: int
    ) -> tuple:
        noisy = self._block_ids(offset, NOISY)
        query = TokenIds(*(torch.cat(pair, 1) for pair in zip(clean_ids, noisy, strict=True)))
        ids = torch.cat([clean, canvas], 1)
        positions = torch.cat([clean_positions, self._block_positions(offset)], 2)
        return ids, positions, query

    def _wanted(self, positions: Tensor, width: int) -> Tensor:
        """Flat indices into ``[N * B]`` as flat indices into ``[N * (width + B)]``, whose last ``B`` columns they mean."""
        size = self.settings.block_size
        row = positions // size
        return positions + (row + 1) * width

    def first(self, canvas: Tensor, positions: Tensor) -> Tensor:
        """Run ``[prompt | masks]``."""
        ids, rope, query = self._merged(self.prompt.input_ids, self.key_ids, self.prompt.position_ids, canvas, 0)
        mask = attention_mask(query, query, context_attention=self.settings.context_attention).unsqueeze(1)
        wanted = self._wanted(positions, self.committed)
        self.step_mask = None
        return self._forward(ids, rope, mask, 0, wanted, **self.session.vision_arguments())

    def step(self, canvas: Tensor, positions: Tensor) -> Tensor:
        """Run the block against the cache; its columns are overwritten by the next forward."""
        if self.step_mask is None:
            query = self._block_ids(0, NOISY)
            self.step_mask = self._mask(query, query)
        return self._forward(canvas, self._block_positions(0), self.step_mask, self.committed, positions)

    def advance(self, finished: Tensor, canvas: Tensor, positions: Tensor) -> Tensor:
        """Run ``[block clean | next block masked]`` and count the clean columns as committed."""
        ids, rope, query = self._merged(finished, self._block_ids(0, CONTEXT), self._block_positions(0), canvas, 1)
        mask = self._mask(query, query)
        start = self.committed
        wanted = self._wanted(positions, self.settings.block_size)
        self._commit_bookkeeping()
        self.step_mask = None
        return self._forward(ids, rope, mask, start, wanted)

    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
        super().select(rows)
        self.step_mask = None
        self.cache.select(rows)


class PlainEngine(BlockEngine):
    """Separate forwards, logits and softmax everywhere, concatenated cache: what the reference does."""

    separate_commits = True

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.cache = DynamicCache()

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor, **kwargs: Any) -> Tensor:
        self.forwards += 1
        logits = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, **kwargs
        ).logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.softmax(-1).log()

    def first(self, canvas: Tensor, positions: Tensor) -> Tensor:
        """Run the prompt, then the block."""
        mask = attention_mask(self.key_ids, self.key_ids, context_attention=self.settings.context_attention)
        self._forward(
            self.prompt.input_ids, self.prompt.position_ids, mask.unsqueeze(1), **self.session.vision_arguments()
        )
        return self.step(canvas, positions)

    def step(self, canvas: Tensor, positions: Tensor) -> Tensor:
        """Run the block and take it out of the cache again."""
        query = self._block_ids(0, NOISY)
        logits = self._forward(canvas, self._block_positions(0), self._mask(query, query))
        self.cache.crop(-canvas.shape[1])
        return logits.flatten(0, 1).index_select(0, positions)

    def advance(self, finished: Tensor, canvas: Tensor, positions: Tensor) -> Tensor:
        """Run the clean block into the cache, then the next block."""
        query = self._block_ids(0, CONTEXT)
        self._forward(finished, self._block_positions(0), self._mask(query, query))
        self._commit_bookkeeping()
        return self.step(canvas, positions)

    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
        super().select(rows)
        self.cache.batch_select_indices(rows)
