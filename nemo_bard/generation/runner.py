"""A denoising step on the device: the state of a batch, the language model on it, and the change that it makes.

A step holds embedding, language model, LM head at the block's positions, proposals, selection and the change of the block, and
it moves rows that have finished a block on to the next one. Cursors, lengths and counters are tensors, so that nothing is
read on the host. There are two shapes: a *narrow* step runs the block alone, ``[N, B]``; a *wide* one runs ``[finished block
| current block]``, ``[N, 2B]``, which commits the finished block on the way. A wide step is right for every row at every
time (a block that is committed again gets the same keys and values), so that rows need not wait for each other; a narrow
one saves work where no row begins a block.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nemo_bard.generation.capture import Captured, GraphPool
from nemo_bard.generation.kernels import Kernels
from nemo_bard.generation.prefix import Prefix, PrefixCache, Sequences, has_kernel
from nemo_bard.generation.resolve import DecodeSettings
from nemo_bard.generation.sampling import propose, uniform_numbers
from nemo_bard.generation.steps import BlockState, Proposal, StepOutcome, StepRule
from nemo_bard.generation.text import FusedText, ModuleText, TextModel, can_fuse


@dataclass(kw_only=True)
class DecodeState:
    """Everything that a step reads and writes, at addresses that stay; one number per row is ``[N]`` int64."""

    canvas: Tensor
    """The current block, ``[N, B]``; the mask id where a token is masked."""
    previous: Tensor
    """The block before it, ``[N, B]``; of no meaning in the first one."""
    is_masked: Tensor
    """``[N, B]`` bool."""
    alive: Tensor
    """Rows that have not ended, ``[N]`` bool."""
    step: Tensor
    """Steps that the current block has had."""
    revisions: Tensor
    """Those since its last mask was gone."""
    block: Tensor
    """Number of the current block in the response."""
    base: Tensor
    """Column of the cache where the current block begins."""
    position: Tensor
    """M-RoPE position of the first token of the current block."""
    end: Tensor
    """Tokens of the response up to the first end id; -1 as long as there is none."""
    seeds: Tensor
    """Of the draws."""
    response: Tensor
    """``[N, capacity]``."""
    counts: Tensor
    """Steps of each block, ``[N, capacity / B]``."""
    num_blocks: Tensor
    """Blocks that the response may have, a scalar."""

    @classmethod
    def empty(cls, rows: int, block_size: int, capacity: int, device: torch.device) -> DecodeState:
        """Allocate."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        numbers = ("step", "revisions", "block", "base", "position", "end", "seeds")
        return cls(
            canvas=zeros(rows, block_size),
            previous=zeros(rows, block_size),
            is_masked=zeros(rows, block_size, dtype=torch.bool),
            alive=zeros(rows, dtype=torch.bool),
            response=zeros(rows, capacity),
            counts=zeros(rows, -(-capacity // block_size)),
            num_blocks=zeros(),
            **{name: zeros(rows) for name in numbers},
        )

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [getattr(self, one.name) for one in fields(self)]

    def begin(self, *, base: Tensor, position: Tensor, seeds: Tensor, num_blocks: int, mask_token_id: int) -> None:
        """Set up the first block.

        Args:
            base: Tokens of each prompt.
            position: Positions behind them.
            seeds: Of the draws.
            num_blocks: Blocks of the response.
            mask_token_id: Fills the block.
        """
        for name in ("previous", "step", "revisions", "block", "response", "counts"):
            getattr(self, name).zero_()
        self.canvas.fill_(mask_token_id)
        self.is_masked.fill_(True)
        self.alive.fill_(True)
        self.end.fill_(-1)
        self.num_blocks.fill_(num_blocks)
        self.base.copy_(base)
        self.position.copy_(position)
        self.seeds.copy_(seeds)


class Runner:
    """Decodes batches of one shape with one set of settings: its state, its cache and its two steps, to be used again.

    Args:
        model: A view of the model that attends to prefixes.
        settings: Those of the calls; ``max_new_tokens`` and what follows from it may differ from call to call.
        rows: Rows of a batch, ``N``.
        capacity: Columns of the cache.
    """

    def __init__(self, model: Any, settings: DecodeSettings, rows: int, capacity: int) -> None:
        self.settings, self.rows, self.capacity = settings, rows, capacity
        text, weight = model.model.language_model, model.get_input_embeddings().weight
        self.device, config = weight.device, model.config.text_config
        kernels = Kernels.compiled() if settings.compile_step else Kernels()
        self.text: TextModel = FusedText(text, kernels) if can_fuse(text) else ModuleText(text)
        self.head = model.lm_head
        self.rule = StepRule(settings, self.device)
        self.state = DecodeState.empty(rows, settings.block_size, capacity, self.device)
        self.cache = PrefixCache(config.num_hidden_layers, rows, capacity)
        self.uses_kernel = has_kernel(
            self.device, weight.dtype, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        )
        self.offsets = torch.arange(settings.block_size, device=self.device)
        pool, captures = GraphPool(), settings.compile_step and self.device.type == "cuda"
        self.steps = {
            wide: Captured(
                partial(self._step, wide),
                self.state.tensors(),
                pool=pool,
                enabled=captures,
                on_failure=self._without_compiler,
            )
            for wide in (False, True)
        }

    def _without_compiler(self) -> None:
        """Go on with kernels that need no compiler, which may be what failed."""
        if isinstance(self.text, FusedText):
            self.text.kernels = Kernels()

    # ------------------ one step ------------------
    def step(self, *, wide: bool) -> None:
        """Take a step of the current blocks; ``wide`` unless no row is at the beginning of one."""
        self.steps[wide]()

    def _step(self, wide: bool) -> None:
        state = self.state
        ids = torch.cat([state.previous, state.canvas], 1) if wide else state.canvas
        self.finish_step(self.head(self.forward(ids, wide=wide).flatten(0, 1)))

    def forward(self, ids: Tensor, *, wide: bool) -> Tensor:
        """Run the language model on ``[N, B]`` or, ``wide``, ``[N, 2B]``; hidden states of the current block ``[N, B, H]``."""
        state, size = self.state, self.settings.block_size
        positions = state.position.unsqueeze(1) + self.offsets
        if wide:
            positions = torch.cat([positions - size, positions], 1)
        return self.text(ids, positions.expand(3, *positions.shape), self.cache, self._prefix(wide), size)

    def finish_step(self, logits: Tensor) -> None:
        """Take the step that logits ``[N * B, V]`` of the current block ask for, and move finished rows on."""
        state, settings, given = self.state, self.settings, self.settings.given
        if given.suppress_mask_token:
            logits[:, settings.mask_token_id] = float("-inf")
        uniform = None
        if given.temperature > 0:
            uniform = uniform_numbers(state.seeds, state.block, state.step, settings.block_size).flatten()
        candidates = propose(
            logits,
            temperature=given.temperature,
            top_k=given.top_k,
            top_p=given.top_p,
            with_entropy=settings.strategy.needs_entropy,
            uniform=uniform,
        )
        entropy = candidates.entropy
        proposal = Proposal(
            candidates.ids.view_as(state.canvas),
            candidates.confidence.view_as(state.canvas),
            None if entropy is None else entropy.view_as(state.canvas),
        )
        before = BlockState(state.canvas, state.is_masked, state.alive, state.step, state.revisions)
        self._move_on(self.rule.apply(before, proposal))

    def _move_on(self, outcome: StepOutcome) -> None:
        """Write a step's outcome into the state; a row whose block is done gets the next one, or ends."""
        state, size = self.state, self.settings.block_size
        number = state.block.unsqueeze(1)
        state.response.scatter_(1, number * size + self.offsets, outcome.canvas)
        state.counts.scatter_add_(1, number, state.alive.long().unsqueeze(1))
        is_done = state.alive & ~outcome.running
        has_end = is_done & (outcome.first_end < size)
        ends = has_end | (is_done & (state.block + 1 >= state.num_blocks))
        moves = is_done & ~ends
        state.end.copy_(torch.where(has_end, state.block * size + outcome.first_end + 1, state.end))
        state.alive.logical_and_(~ends)
        row = moves.unsqueeze(1)
        state.previous.copy_(torch.where(row, outcome.canvas, state.previous))
        state.canvas.copy_(outcome.canvas.masked_fill(row, self.settings.mask_token_id))
        state.is_masked.copy_(outcome.is_masked | row)
        state.step.copy_((state.step + 1).masked_fill(moves, 0))
        state.revisions.copy_(outcome.revisions.masked_fill(moves, 0))
        state.block.add_(moves)
        state.base.add_(moves * size)
        state.position.add_(moves * size)

    def _prefix(self, wide: bool) -> Prefix:
        """Where the tokens of a step go and what they see; in the first block the finished one goes where nobody looks."""
        state, size = self.state, self.settings.block_size
        base = state.base.unsqueeze(1)
        columns, visible = base + self.offsets, (base + size).expand(-1, size)
        if wide:
            has_previous = (state.block > 0).unsqueeze(1)
            begin = torch.where(has_previous, base - size, self.capacity - size)
            seen = base.expand(-1, size)
            if self.is_causal:
                seen = torch.where(has_previous, base - size, 0) + self.offsets + 1
            columns, visible = torch.cat([begin + self.offsets, columns], 1), torch.cat([seen, visible], 1)
        return Prefix(
            columns=columns,
            visible=visible,
            width=self.capacity,
            capacity=self.capacity,
            sequences=self._sequences(wide) if self.uses_kernel else [],
        )

    @property
    def is_causal(self) -> bool:
        """Whether context tokens see nothing that comes later."""
        return self.settings.context_attention == "causal"

    def _sequences(self, wide: bool) -> list[Sequences]:
        base, size = self.state.base, self.settings.block_size
        if not wide:
            return [self._of_blocks(base + size, 1)]
        if not self.is_causal:
            return [self._of_blocks(torch.stack([base, base + size], 1).flatten(), 2)]
        halves = torch.arange(self.rows * 2 * size, device=self.device).view(self.rows, 2, size)
        finished = self._of_blocks(base, 1, causal=True, queries=halves[:, 0].flatten())
        return [finished, self._of_blocks(base + size, 1, queries=halves[:, 1].flatten())]

    def _of_blocks(self, used: Tensor, blocks: int, **what: Any) -> Sequences:
        """Sequences of one block each, ``blocks`` of them per row."""
        size = self.settings.block_size
        edges = torch.arange(0, (self.rows * blocks + 1) * size, size, dtype=torch.int32, device=self.device)
        row = torch.arange(self.rows * blocks + 1, dtype=torch.int32, device=self.device) // blocks
        return Sequences(edges=edges, starts=row * self.capacity, used=used.int(), longest=size, **what)
