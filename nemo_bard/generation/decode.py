"""Blockwise denoising: the loop.

All rows of a batch work on the same block number; a row that has ended leaves the batch. How logits come about is the
engine's matter (``nemo_bard.generation.engines``), which positions are fixed is the strategy's.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nemo_bard.generation.engines import Engine
from nemo_bard.generation.graph import GraphEngine
from nemo_bard.generation.sampling import draw_seeds, propose, tokens_per_step, uniform_numbers
from nemo_bard.generation.session import Session
from nemo_bard.generation.steps import BlockState, Proposal, StepOutcome, StepRule

logger = logging.getLogger(__name__)


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
    draft: Tensor | None = None
    """As ``ids``, with what the step proposed where a token is still masked, ``[rows, B]``."""


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
    accepted_tokens: Tensor | None = None
    """Of next-token decoding: response tokens that each forward of each row found, ``[N, forwards]``."""


@dataclass
class Hooks:
    """What callers may plug into the loop; every field is optional."""

    logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None
    """``(input_ids [K, ...], logits [K, V]) -> logits``, as in transformers."""
    stopping_criteria: Callable[[Tensor, Any], Any] | None = None
    """``(input_ids [N, ...], None) -> bool [N]``, asked after each block."""
    on_draft: Callable[[Tensor], None] | None = None
    """Called with the current block of all rows after each step."""
    on_step: Callable[[StepRecord], None] | None = None
    """Called with the record of each step."""
    on_block: Callable[[Tensor], None] | None = None
    """Called with the new tokens of a finished block, cut at the end of the row (batch of one)."""


@functools.cache
def say_once(text: str) -> None:
    """Log a warning, the first time that it is asked for."""
    logger.warning("%s", text)


class Loop:
    """What the loops of one batch have in common: ``run`` decodes, ``_run`` is how."""

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
        self.given, self.hooks = self.settings.given, hooks or Hooks()
        self.device = self.prompt.input_ids.device
        self.synchronize = synchronize and self.prompt.input_ids.is_cuda
        rows = len(self.prompt.input_ids)
        self.seeds = torch.zeros(rows, dtype=torch.int64, device=self.device)
        if self.given.temperature > 0:
            self.seeds = draw_seeds(rows, self.device, generator)
        self.history: list[StepRecord] = []

    def run(self) -> DecodeResult:
        """Decode the batch."""
        with torch.no_grad():
            return self._run()

    def _run(self) -> DecodeResult:
        raise NotImplementedError

    def _clock(self) -> float:
        if self.synchronize:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Decoder(Loop):
    """The loop over blocks and steps for one batch."""

    def __init__(self, session: Session, **options: Any) -> None:
        """Prepare decoding; ``options`` are those of ``Loop``."""
        super().__init__(session, **options)
        settings, rows = self.settings, len(self.prompt.input_ids)
        self.engine: Engine = settings.engine(session)
        self.quota = tokens_per_step(settings.block_size, settings.denoising_steps)
        self.rule = StepRule(settings, self.device)
        self.response = torch.full(
            (rows, settings.num_blocks * settings.block_size), settings.pad_token_id, device=self.device
        )
        self.lengths = [0] * rows
        self.counts = torch.zeros(rows, settings.num_blocks, dtype=torch.int64)
        self.commits = [0] * rows

    def _run(self) -> DecodeResult:
        settings, rows = self.settings, self.prompt.input_ids.shape[0]
        start = self._clock()
        self.session.encode_vision()
        after_vision = self._clock()
        if isinstance(self.engine, GraphEngine) and self._looks_at_no_step():
            return self._run_on_device(self.engine, start, after_vision)
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
            if len(going) < len(live) and not getattr(self.engine, "fixed_rows", False):
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

    def _looks_at_no_step(self) -> bool:
        """Whether nothing on the host is to come between two steps; says so where that makes decoding slower."""
        reasons = {
            "output_history": self.settings.given.output_history,
            "a streamer with put_draft": self.hooks.on_draft is not None,
            "a streamer with put_step": self.hooks.on_step is not None,
            "logits_processor": self.hooks.logits_processor is not None,
            "stopping_criteria": self.hooks.stopping_criteria is not None,
            f"remasking_strategy={self.settings.given.remasking_strategy}": not self.settings.strategy.on_device,
        }
        found = [reason for reason, applies in reasons.items() if applies]
        if found and self.settings.compile_step:
            say_once(f"decoding goes step by step from the host, without CUDA graphs, for {', '.join(found)}")
        return not found

    def _run_on_device(self, engine: GraphEngine, start: float, after_vision: float) -> DecodeResult:
        stages = engine.decode(self.seeds, self.hooks.on_block)
        next(stages)
        after_prefill = self._clock()
        response = next(stages)
        assert response is not None
        end = self._clock()
        return DecodeResult(
            sequences=response.ids[:, : max(response.lengths)],
            lengths=response.lengths,
            block_step_counts=response.counts,
            commit_forwards=self.commits,
            forwards=engine.forwards,
            seconds={
                "vision": after_vision - start,
                "prefill": after_prefill - after_vision,
                "decode": end - after_prefill,
            },
        )

    def _denoise(
        self, block: int, canvas: Tensor, logits: Tensor, positions: Tensor, live: list[int], going: list[int]
    ) -> tuple[Tensor, list[int]]:
        """Denoise one block of the rows ``going``; returns its tokens ``[rows, B]`` and each row's first EOS (``B`` if none).

        ``logits`` ``[K, V]`` are those of the first step, at the flat ``positions`` ``[K]`` of ``canvas``.
        """
        running = torch.zeros(len(live), dtype=torch.bool, device=self.device)
        running[torch.tensor(going, device=self.device)] = True
        counter = torch.zeros(len(live), dtype=torch.int64, device=self.device)
        state = BlockState(canvas, running.unsqueeze(1).expand_as(canvas), running, counter, counter)
        running_rows, step = going, 0
        while True:
            proposal = self._propose(block, state, logits, positions, live)
            outcome = self.rule.apply(state, proposal, self.quota[min(step, len(self.quota) - 1)])
            if self.settings.given.output_history or self.hooks.on_step is not None:
                self._record(block, step, live, running_rows, outcome, proposal)
            state = BlockState(outcome.canvas, outcome.is_masked, outcome.running, state.step + 1, outcome.revisions)
            wanted = self.rule.wanted(state)
            # the step's one look at the device
            summary = torch.stack([state.running.long(), wanted.sum(1), outcome.first_end]).tolist()
            for index in running_rows:
                self.counts[live[index], block] += 1
            if self.hooks.on_draft is not None:
                self.hooks.on_draft(torch.where(state.is_masked, proposal.ids, state.canvas))
            running_rows = [i for i, on in enumerate(summary[0]) if on]
            if not running_rows:
                return state.canvas, summary[2]
            positions = torch.argsort(~wanted.flatten(), stable=True)[: sum(summary[1])]
            logits = self.engine.step(state.canvas, positions)
            step += 1

    def _propose(self, block: int, state: BlockState, logits: Tensor, positions: Tensor, live: list[int]) -> Proposal:
        """Turn logits ``[K, V]`` at flat positions ``[K]`` of the canvas into proposals."""
        settings, canvas = self.settings, state.canvas
        if settings.given.suppress_mask_token:
            logits[:, settings.mask_token_id] = float("-inf")
        if self.hooks.logits_processor is not None:
            context = self._context(live, canvas)
            logits = self.hooks.logits_processor(context[positions // settings.block_size], logits)
        uniform = None
        if settings.given.temperature > 0:
            seeds = self.seeds[torch.tensor(live, device=self.device)]
            number = torch.full_like(seeds, block)
            uniform = uniform_numbers(seeds, number, state.step, settings.block_size).flatten()[positions]
        candidates = propose(
            logits,
            temperature=settings.given.temperature,
            top_k=settings.given.top_k,
            top_p=settings.given.top_p,
            with_entropy=settings.strategy.needs_entropy,
            uniform=uniform,
        )
        entropy = candidates.entropy
        return Proposal(
            canvas.flatten().index_copy(0, positions, candidates.ids).view_as(canvas),
            self._scatter(candidates.confidence, positions, canvas),
            None if entropy is None else self._scatter(entropy, positions, canvas),
        )

    def _context(self, live: list[int], canvas: Tensor | None = None) -> Tensor:
        """Prompt, response so far and current block of the live rows, ``[rows, ...]``."""
        index = torch.tensor(live, device=self.device)
        done = max(self.lengths)
        parts = [self.prompt.input_ids[index], self.response[index, :done]]
        return torch.cat(parts if canvas is None else [*parts, canvas], 1)

    def _scatter(self, values: Tensor, positions: Tensor, canvas: Tensor) -> Tensor:
        return values.new_zeros(canvas.numel()).index_copy(0, positions, values).view_as(canvas)

    def _record(
        self, block: int, step: int, live: list[int], running: list[int], outcome: StepOutcome, proposal: Proposal
    ) -> None:
        index = torch.tensor(running, device=self.device)
        confidence = outcome.confidence[index]
        confidence = confidence.masked_fill(confidence.isinf(), float("nan"))
        record = StepRecord(
            block=block,
            step=step,
            rows=[live[i] for i in running],
            ids=outcome.canvas[index].cpu(),
            confidence=confidence.float().cpu(),
            fixed=outcome.changed[index].cpu(),
            draft=torch.where(outcome.is_masked, proposal.ids, outcome.canvas)[index].cpu(),
        )
        if self.settings.given.output_history:
            self.history.append(record)
        if self.hooks.on_step is not None:
            self.hooks.on_step(record)

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
