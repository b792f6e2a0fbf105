"""Blockwise denoising: the loop.

All rows of a batch work on the same block number; a row that has ended leaves the batch. How logits come about is the
engine's matter (``nemo_bard.generation.engines``), which positions are fixed is the strategy's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nemo_bard.generation.engines import Engine
from nemo_bard.generation.parameters import ENGINES
from nemo_bard.generation.sampling import Candidates, propose, tokens_per_step
from nemo_bard.generation.session import Session
from nemo_bard.generation.strategies import StepState


@dataclass(kw_only=True)
class StepRecord:
    """One denoising step of the batch, for visualisation; rows that were not running are absent."""

    block: int
    step: int
    rows: list[int]
    ids: Tensor
    """Block content after the step, ``[rows, B]``; the mask id where still masked."""
    confidence: Tensor
    """Probability of the proposed token, ``[rows, B]``; nan where none was proposed."""
    fixed: Tensor
    """True where the step fixed or replaced a token, ``[rows, B]``."""


@dataclass(kw_only=True)
class DecodeResult:
    """What the loop produced, on CPU except ``sequences``."""

    sequences: Tensor
    """Response ids, ``[N, longest]``, padded after each row's end."""
    lengths: list[int]
    """Response tokens of each row, its EOS included."""
    block_step_counts: Tensor
    """Denoising forwards of each row in each block, ``[N, blocks]``; 0 where a block was not started."""
    commit_forwards: list[int]
    """Forwards of each row that only committed a block; 0 where the commit rides on a denoising forward."""
    forwards: int
    """Forwards of the language model for the whole batch, prompt included."""
    seconds: dict[str, float]
    history: list[StepRecord] = field(default_factory=list)


@dataclass
class Hooks:
    """What callers may plug into the loop; every field is optional."""

    logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None
    """``(input_ids [K, ...], logits [K, V]) -> logits``, as in transformers."""
    stopping_criteria: Callable[[Tensor, Any], Any] | None = None
    """``(input_ids [N, ...], None) -> bool [N]``, asked after each block."""
    on_draft: Callable[[Tensor], None] | None = None
    """Called with the current block of all rows after each step."""
    on_block: Callable[[Tensor], None] | None = None
    """Called with the new tokens of a finished block, cut at the end of the row (batch of one)."""


class Decoder:
    """The loop over blocks and steps for one batch."""

    def __init__(
        self,
        session: Session,
        *,
        hooks: Hooks | None = None,
        generator: torch.Generator | None = None,
        synchronize: bool = False,
    ) -> None:
        """Prepare decoding.

        Args:
            session: Model, prompt and settings of the call.
            hooks: Callbacks.
            generator: Source of randomness on the model's device.
            synchronize: Wait for the device around the timed phases.
        """
        self.session, self.prompt, self.settings = session, session.prompt, session.settings
        self.hooks = hooks or Hooks()
        self.generator = generator
        prompt, settings = self.prompt, self.settings
        self.engine: Engine = ENGINES.get(settings.given.decode_path)(session)
        self.synchronize = synchronize and prompt.input_ids.is_cuda
        self.device = prompt.input_ids.device
        self.quota = tokens_per_step(settings.block_size, settings.denoising_steps)
        rows = prompt.input_ids.shape[0]
        self.response = torch.full(
            (rows, settings.num_blocks * settings.block_size), settings.pad_token_id, device=self.device
        )
        self.lengths = [0] * rows
        self.counts = torch.zeros(rows, settings.num_blocks, dtype=torch.int64)
        self.commits = [0] * rows
        self.history: list[StepRecord] = []
        self.end_ids = torch.tensor(settings.end_ids, dtype=torch.int64, device=self.device)

    def run(self) -> DecodeResult:
        """Decode the batch."""
        with torch.no_grad():
            return self._run()

    def _clock(self) -> float:
        if self.synchronize:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _run(self) -> DecodeResult:
        settings, rows = self.settings, self.prompt.input_ids.shape[0]
        start = self._clock()
        self.session.encode_vision()
        after_vision = self._clock()
        after_prefill = after_vision
        live = list(range(rows))  # rows of the batch that the engine still runs
        going = list(range(rows))  # indices into `live` that have not ended; all of them unless shapes are fixed
        finished: Tensor | None = None
        for block in range(settings.num_blocks):
            canvas = torch.full((len(live), settings.block_size), settings.mask_token_id, device=self.device)
            index = torch.tensor(going, device=self.device).unsqueeze(1) * settings.block_size
            positions = (index + torch.arange(settings.block_size, device=self.device)).flatten()
            if finished is None:
                logits = self.engine.first(canvas, positions)
                after_prefill = self._clock()
            else:
                logits = self.engine.advance(finished, canvas, positions)
            finished, ends = self._denoise(block, canvas, logits, positions, live, going)
            going = self._close_block(block, finished, ends, live, going)
            if not going or block + 1 == settings.num_blocks:
                break
            if self.engine.separate_commits:
                for index in going:
                    self.commits[live[index]] += 1
            if len(going) < len(live) and not settings.compile_step:  # another batch size would be compiled anew
                keep = torch.tensor(going, device=self.device)
                self.engine.select(keep)
                finished = finished[keep]
                live = [live[index] for index in going]
                going = list(range(len(live)))
        end = self._clock()
        longest = max(self.lengths)
        return DecodeResult(
            sequences=self.response[:, :longest],
            lengths=self.lengths,
            block_step_counts=self.counts,
            commit_forwards=self.commits,
            forwards=self.engine.forwards,
            seconds={
                "vision": after_vision - start,
                "prefill": after_prefill - after_vision,
                "decode": end - after_prefill,
            },
            history=self.history,
        )

    def _denoise(
        self, block: int, canvas: Tensor, logits: Tensor, positions: Tensor, live: list[int], going: list[int]
    ) -> tuple[Tensor, list[int]]:
        """Denoise one block of the rows ``going``; returns its tokens ``[rows, B]`` and each row's first EOS (``B`` if none).

        ``logits`` ``[K, V]`` are those of the first step, at the flat ``positions`` ``[K]`` of ``canvas``.
        """
        settings = self.settings
        size, threshold = settings.block_size, settings.given.edit_threshold
        editing = threshold is not None
        running = torch.zeros(len(live), dtype=torch.bool, device=self.device)
        running[torch.tensor(going, device=self.device)] = True
        is_masked = running.unsqueeze(1).expand_as(canvas)
        post_steps = torch.zeros(len(live), dtype=torch.int64, device=self.device)
        running_rows = going
        columns = torch.arange(size, device=self.device)
        step = 0
        while True:
            candidates = self._propose(logits, canvas, positions, live)
            proposed = canvas.flatten().index_copy(0, positions, candidates.ids).view_as(canvas)
            confidence = self._scatter(candidates.confidence, positions, canvas, float("-inf"))
            entropy = None
            if candidates.entropy is not None:
                entropy = self._scatter(candidates.entropy, positions, canvas, float("inf"))
                entropy = entropy.masked_fill(~is_masked, float("inf"))
            state = StepState(
                confidence.masked_fill(~is_masked, float("-inf")),
                entropy,
                is_masked,
                self.quota[min(step, len(self.quota) - 1)],
            )
            chosen = settings.strategy.fix(state)
            if settings.given.suppress_mask_token and step + 1 >= settings.denoising_steps:
                chosen = is_masked  # whatever a strategy leaves, no mask id comes out
            change = chosen & is_masked & running.unsqueeze(1) & (proposed != settings.mask_token_id)
            still_masked = is_masked & ~change
            unfinished = still_masked.any(1)
            next_running = unfinished & (step + 1 < settings.denoising_steps)
            if editing:
                edit = ~is_masked & (proposed != canvas) & (confidence > threshold) & running.unsqueeze(1)
                edit &= proposed != settings.mask_token_id
                was_done = ~is_masked.any(1)
                post_steps = post_steps + (was_done & running)
                change = change | edit
                # Revision may go on after the last mask: at first unconditionally, then as long as something changes.
                again = running & ~unfinished & (post_steps < settings.given.max_post_edit_steps)
                next_running = next_running | (again & (~was_done | change.any(1)))
            canvas = torch.where(change, proposed, canvas)
            if settings.given.output_history:
                self._record(block, step, live, running_rows, canvas, confidence, change)
            is_masked = still_masked
            wanted = (torch.ones_like(is_masked) if editing else is_masked) & next_running.unsqueeze(1)
            first_end = torch.where(torch.isin(canvas, self.end_ids), columns, size).amin(1)
            summary = torch.stack([next_running.long(), wanted.sum(1), first_end]).tolist()  # the step's one host sync
            for index in running_rows:
                self.counts[live[index], block] += 1
            if self.hooks.on_draft is not None:
                self.hooks.on_draft(torch.where(is_masked, proposed, canvas))
            running, running_rows = next_running, [i for i, on in enumerate(summary[0]) if on]
            if not running_rows:
                return canvas, summary[2]
            positions = torch.argsort(~wanted.flatten(), stable=True)[: sum(summary[1])]
            logits = self.engine.step(canvas, positions)
            step += 1

    def _propose(self, logits: Tensor, canvas: Tensor, positions: Tensor, live: list[int]) -> Candidates:
        settings = self.settings
        if settings.given.suppress_mask_token:
            logits[:, settings.mask_token_id] = float("-inf")
        if self.hooks.logits_processor is not None:
            context = self._context(live, canvas)
            logits = self.hooks.logits_processor(context[positions // settings.block_size], logits)
        return propose(
            logits,
            temperature=settings.given.temperature,
            top_k=settings.given.top_k,
            top_p=settings.given.top_p,
            with_entropy=settings.strategy.needs_entropy,
            generator=self.generator,
        )

    def _context(self, live: list[int], canvas: Tensor | None = None) -> Tensor:
        """Prompt, response so far and current block of the live rows, ``[rows, ...]``."""
        index = torch.tensor(live, device=self.device)
        done = max(self.lengths)
        parts = [self.prompt.input_ids[index], self.response[index, :done]]
        return torch.cat(parts if canvas is None else [*parts, canvas], 1)

    def _scatter(self, values: Tensor, positions: Tensor, canvas: Tensor, fill: float) -> Tensor:
        full = values.new_full((canvas.numel(),), fill)
        return full.index_copy(0, positions, values).view_as(canvas)

    def _record(
        self, block: int, step: int, live: list[int], running: list[int], canvas: Tensor, conf: Tensor, change: Tensor
    ) -> None:
        index = torch.tensor(running, device=self.device)
        confidence = conf[index].masked_fill(conf[index].isinf(), float("nan"))
        self.history.append(
            StepRecord(
                block=block,
                step=step,
                rows=[live[i] for i in running],
                ids=canvas[index].cpu(),
                confidence=confidence.float().cpu(),
                fixed=change[index].cpu(),
            )
        )

    def _close_block(
        self, block: int, finished: Tensor, ends: list[int], live: list[int], going: list[int]
    ) -> list[int]:
        """Store a finished block of the rows ``going``; returns the indices (into ``live``) of those that go on."""
        settings = self.settings
        size, begin = settings.block_size, block * settings.block_size
        room = min(size, settings.given.max_new_tokens - begin)
        for index in going:
            row = live[index]
            taken = min(ends[index] + 1, room)
            self.response[row, begin : begin + taken] = finished[index, :taken]
            self.lengths[row] = begin + taken
            if self.hooks.on_block is not None:
                self.hooks.on_block(finished[index, :taken])
        going = [index for index in going if ends[index] >= size]
        if self.hooks.stopping_criteria is not None and going:
            stop = self.hooks.stopping_criteria(self._context(live), None)
            flags = stop.tolist() if isinstance(stop, Tensor) else [bool(stop)] * len(live)
            going = [index for index in going if not flags[index]]
        return going
