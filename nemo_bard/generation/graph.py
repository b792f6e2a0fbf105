"""The engine for CUDA: whole denoising steps on the device, captured by hand as CUDA graphs, one of each shape.

Nothing is read on the host but one flag every few steps; ``nemo_bard.generation.runner`` says what a step is. Without CUDA the
same code runs step by step. Whoever wants to look at single steps (drafts, history, a logits processor) gets them from
the loop of ``decode``, which this engine serves like any other, without graphs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nemo_bard.generation.prefix import NAME as PREFIX_ATTENTION
from nemo_bard.generation.prompt_prefix import prompt_prefix
from nemo_bard.generation.runner import Runner
from nemo_bard.generation.session import Session

FLAG_STEPS = 4
"""Steps between two looks at the device."""
MIN_CAPACITY = 512
"""Caches hold a power of two of tokens, at least this many, so that most calls find one that fits."""
PER_CALL: dict[str, Any] = {
    "max_new_tokens": 1,
    "return_dict_in_generate": False,
    "return_step_stats": False,
    "output_history": False,
}
"""Settings that a ``Runner`` does not depend on, as values that all calls share."""


class Response(NamedTuple):
    """What came out."""

    ids: Tensor
    """``[N, blocks * B]`` int64, the pad id behind each row's end."""
    lengths: list[int]
    counts: Tensor
    """Denoising steps of each block, ``[N, blocks]`` int64 on CPU."""


class GraphEngine:
    """Whole steps on the device; see the module."""

    separate_commits: ClassVar[bool] = False
    fixed_rows: ClassVar[bool] = True
    attention: ClassVar[str] = PREFIX_ATTENTION

    def __init__(self, session: Session) -> None:
        self.session, self.settings, self.prompt = session, session.settings, session.prompt
        rows, size = len(self.prompt.lengths), self.settings.block_size
        # one more block, for what nobody looks at
        needed = max(self.prompt.lengths) + (self.settings.num_blocks + 1) * size
        key = (rows, dataclasses.replace(self.settings, given=dataclasses.replace(self.settings.given, **PER_CALL)))
        self.runner: Runner = session.borrow(
            key,
            fits=lambda runner: runner.capacity >= needed,
            make=lambda: Runner(session.model, self.settings, rows, max(MIN_CAPACITY, 1 << (needed - 1).bit_length())),
        )
        self.forwards = 0

    # ------------------ the whole response ------------------
    def decode(self, seeds: Tensor, on_block: Callable[[Tensor], None] | None = None) -> Iterator[Response | None]:
        """Decode everything.

        Args:
            seeds: Of the rows' draws, ``[N]`` int64.
            on_block: Called with the new tokens of each finished block of the only row.

        Yields:
            None when the prompt and the first step are done, then the response.
        """
        runner, settings = self.runner, self.settings
        masks = torch.full_like(runner.state.canvas, settings.mask_token_id)
        runner.finish_step(self._prefill(masks, seeds))
        yield None
        told = 0
        is_fixed = settings.strategy.fixed_steps and not runner.rule.is_editing
        while True:
            if self.forwards % FLAG_STEPS == 0:
                alive, blocks = torch.stack([runner.state.alive.any().long(), runner.state.block.amin()]).tolist()
                if not alive:
                    break
                if on_block is not None:
                    self._tell(told, blocks, on_block)
                    told = blocks
            runner.step(wide=not is_fixed or self.forwards % settings.denoising_steps == 0)
            self.forwards += 1
        response = self._response()
        if on_block is not None:
            self._tell(told, -(-response.lengths[0] // settings.block_size), on_block, response.lengths[0])
        yield response

    def _tell(self, first: int, last: int, on_block: Callable[[Tensor], None], length: int | None = None) -> None:
        size = self.settings.block_size
        for block in range(first, last):
            end = (block + 1) * size if length is None else min((block + 1) * size, length)
            on_block(self.runner.state.response[0, block * size : end].clone())

    def _response(self) -> Response:
        state, settings = self.runner.state, self.settings
        most = settings.given.max_new_tokens
        lengths = torch.where(state.end >= 0, state.end.clamp_max(most), most)
        columns = torch.arange(settings.num_blocks * settings.block_size, device=lengths.device)
        ids = state.response[:, : len(columns)].masked_fill(columns >= lengths.unsqueeze(1), settings.pad_token_id)
        return Response(ids, lengths.tolist(), state.counts[:, : settings.num_blocks].to("cpu", copy=True))

    # ------------------ step by step, for whoever wants to look in between ------------------
    def first(self, canvas: Tensor, positions: Tensor) -> Tensor:
        """Run ``[prompt | masks]``."""
        return self._prefill(canvas, canvas.new_zeros(len(canvas))).index_select(0, positions)

    def step(self, canvas: Tensor, positions: Tensor) -> Tensor:
        """Run the block against the cache; its columns are overwritten by the next forward."""
        return self._logits(canvas, positions, wide=False)

    def advance(self, finished: Tensor, canvas: Tensor, positions: Tensor) -> Tensor:
        """Run ``[block clean | next block masked]`` and count the clean columns as committed."""
        state, size = self.runner.state, self.settings.block_size
        state.block.add_(1)
        state.base.add_(size)
        state.position.add_(size)
        return self._logits(torch.cat([finished, canvas], 1), positions, wide=True)

    def _logits(self, ids: Tensor, positions: Tensor, *, wide: bool) -> Tensor:
        self.forwards += 1
        hidden = self.runner.forward(ids, wide=wide).flatten(0, 1)
        return self.runner.head(hidden.index_select(0, positions))

    def select(self, rows: Tensor) -> None:
        """Not used: the number of rows is fixed.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(f"{type(self).__name__} keeps its rows, asked for {len(rows)}")

    # ------------------ the prompt ------------------
    def _prefill(self, canvas: Tensor, seeds: Tensor) -> Tensor:
        """Run ``[prompt | first block]`` of every row, on the left of the cache; logits of the block, ``[N * B, V]``."""
        self.forwards += 1
        prompt, runner, settings = self.prompt, self.runner, self.settings
        size, width = settings.block_size, prompt.input_ids.shape[1]
        lengths = torch.tensor(prompt.lengths).to(runner.device, non_blocking=True)
        behind = (prompt.next_position.unsqueeze(1) + runner.offsets).expand(3, -1, -1)
        # prompts come with their padding on the left; a turn of each row brings it behind the block
        turn = (torch.arange(width + size, device=runner.device) + (width - lengths).unsqueeze(1)) % (width + size)
        ids = torch.cat([prompt.input_ids, canvas], 1).gather(1, turn)
        positions = torch.cat([prompt.position_ids, behind], 2).gather(2, turn.expand(3, -1, -1))
        runner.state.begin(
            base=lengths,
            position=prompt.next_position,
            seeds=seeds,
            num_blocks=settings.num_blocks,
            mask_token_id=settings.mask_token_id,
        )
        prefix = prompt_prefix(
            prompt, size, runner.capacity, is_causal=runner.is_causal, device=runner.device, kernel=runner.uses_kernel
        )
        runner.cache.prefix = prefix
        rows = torch.arange(runner.rows, device=runner.device).unsqueeze(1) * (width + size)
        return self.session.model(
            input_ids=ids,
            attention_mask=None,
            position_ids=positions,
            past_key_values=runner.cache,
            output_positions=(rows + lengths.unsqueeze(1) + runner.offsets).flatten(),
            prefix=prefix,
            **self.session.vision_arguments(),
        ).logits
