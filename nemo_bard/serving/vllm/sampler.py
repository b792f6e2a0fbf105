"""The sampler of vLLM's runner: a denoising step of every request whose block was in the batch.

Nothing is read on the host: which requests commit a block, which take another step and which are done is decided on the
device, for all requests with equal settings at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from nemo_bard.generation.sampling import propose, uniform_numbers
from nemo_bard.generation.steps import BlockState, Proposal, StepRule
from nemo_bard.serving.vllm.rules import Rules

TILE = 2**28
"""Most logits that are looked at together; each float32 temporary of a step is four times as many bytes."""
COUNTERS = ("step", "revisions", "block", "done", "limit", "seed")


@dataclass
class _Rows:
    """Requests of a batch with equal settings."""

    rows: Tensor
    """Rows of the batch, ``[G]``."""
    slots: Tensor
    """Their slots, ``[G]``."""
    sizes: Tensor
    """Tokens of the block that are in the batch: ``B``, fewer where the context ends, ``[G]``."""
    logits: Tensor
    """``[G * B, V]``."""


class BardSampler:
    """Stands for vLLM's ``Sampler``; holds the blocks of all slots."""

    compute_nans = False
    penalties_state = SimpleNamespace(output_bin_counts=None)
    """vLLM's runner then keeps no counts for penalties."""

    def __init__(self, state: Any, sampler: Any) -> None:
        """Prepare the slots.

        Args:
            state: The ``BardModelState``; its ``committing`` and ``arrivals`` are shared.
            sampler: vLLM's, whose states the runner goes on reading.
        """
        self.state, self.req_states, self.sampling_states = state, sampler.req_states, sampler.sampling_states
        slots, device = state.max_num_reqs, state.device
        self.width, self.mask_id = state.width, state.hf_config.mask_token_id
        self.canvas = torch.full((slots, self.width), self.mask_id, dtype=torch.int64, device=device)
        self.counters = torch.zeros(len(COUNTERS), slots, dtype=torch.int64, device=device)
        self.step, self.revisions, self.block, self.done, self.limit, self.seed = self.counters.unbind()
        self.stops = torch.full((slots, 8), -1, dtype=torch.int64, device=device)
        self.columns = torch.arange(self.width, device=device)
        self.rules = Rules(state.hf_config, device)
        self.rule_of: list[StepRule | None] = [None] * slots
        self.staged: dict[int, tuple[list[int], tuple[int, ...]]] = {}

    def add_request(self, req_idx: int, params: Any) -> None:
        """Note the settings of a request that takes a slot; a request that was preempted comes again, its tokens kept."""
        request_id, generated = self.state.arrivals.pop(req_idx)
        asked = self.rules.of(params, request_id)
        self.rule_of[req_idx] = asked.rule
        counters = [0, 0, generated // self.width, generated, asked.max_tokens, asked.seed]
        self.staged[req_idx] = (counters, asked.stop_ids)

    def apply_staged_writes(self) -> None:
        """Write what ``add_request`` noted."""
        if not self.staged:
            return
        device = self.canvas.device
        slots = torch.tensor(list(self.staged)).to(device, non_blocking=True)
        counters = torch.tensor([row for row, _ in self.staged.values()]).to(device, non_blocking=True)
        longest = max(len(ids) for _, ids in self.staged.values())
        if longest > self.stops.shape[1]:
            self.stops = torch.nn.functional.pad(self.stops, (0, longest - self.stops.shape[1]), value=-1)
        stops = torch.full((len(self.staged), self.stops.shape[1]), -1)
        for row, (_, ids) in zip(stops, self.staged.values(), strict=True):
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        self.counters[:, slots] = counters.T
        self.stops[slots] = stops.to(device, non_blocking=True)
        self.canvas[slots] = self.mask_id
        self.staged.clear()

    def __call__(self, logits: Tensor, input_batch: Any, draft_logits: Tensor | None = None) -> SamplerOutput:
        """Take a step.

        Args:
            logits: Of all blocks of the batch, one row per token; their mask column is overwritten.
            input_batch: vLLM's.
            draft_logits: Not used.

        Returns:
            The tokens of blocks that are committed or end their request.
        """
        del draft_logits
        count, device = input_batch.num_reqs, self.canvas.device
        sampled = torch.zeros(count, self.width, dtype=torch.int32, device=device)
        num_sampled, num_rejected = torch.zeros(2, count, dtype=torch.int32, device=device).unbind()
        slots = input_batch.idx_mapping_np[:count]
        starts = input_batch.cu_num_logits_np[: count + 1]
        sizes = np.diff(starts)
        scheduled = input_batch.num_computed_prefill_tokens_np[:count] + input_batch.num_scheduled_tokens[:count]
        begins = np.flatnonzero((sizes == 0) & (scheduled >= input_batch.prefill_len_np[:count]))
        if len(begins):
            self.state.committing[self._send(slots[begins])] = False
        for rule, rows in self._groups(slots, sizes, logits.shape[-1]):
            found = _Rows(
                self._send(rows),
                self._send(slots[rows]),
                self._send(sizes[rows]),
                self._gather(logits, starts[rows], sizes[rows]),
            )
            tokens, emitted = self._step(rule, found)
            sampled[found.rows] = tokens.int()
            num_sampled[found.rows] = (emitted * found.sizes).int()
            num_rejected[found.rows] = (~emitted * found.sizes).int()
        all_slots = input_batch.idx_mapping[:count]
        drafts = self.req_states.draft_tokens
        drafts[all_slots, : self.width] = self.canvas[all_slots].to(drafts.dtype)
        return SamplerOutput(
            sampled_token_ids=sampled,
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _send(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers.astype(np.int64)).to(self.canvas.device, non_blocking=True)

    def _groups(self, slots: np.ndarray, sizes: np.ndarray, vocab_size: int) -> list[tuple[StepRule, np.ndarray]]:
        """Rows with a block in the batch by their rule, in parts of bounded size."""
        groups: dict[int, list[int]] = {}
        rules: dict[int, StepRule] = {}
        for row in np.flatnonzero(sizes).tolist():
            rule = self.rule_of[slots[row]] or self.rules.rule({})  # a dummy batch has slots without a request
            rules[id(rule)] = rule
            groups.setdefault(id(rule), []).append(row)
        most = max(TILE // (self.width * vocab_size), 1)
        return [
            (rules[key], np.array(rows[first : first + most]))
            for key, rows in groups.items()
            for first in range(0, len(rows), most)
        ]

    def _gather(self, logits: Tensor, starts: np.ndarray, sizes: np.ndarray) -> Tensor:
        """Logits of some rows, ``[G * B, V]``; a view where they lie side by side. Short blocks are filled up with anything."""
        width, first = self.width, int(starts[0])
        if (sizes == width).all() and (starts == first + np.arange(len(starts)) * width).all():
            return logits[first : first + len(starts) * width]
        index = starts[:, None] + np.minimum(np.arange(width), sizes[:, None] - 1)
        return logits[self._send(index.ravel())]

    def _step(self, rule: StepRule, found: _Rows) -> tuple[Tensor, Tensor]:
        """Denoise, commit or end; returns the blocks ``[G, B]`` and which of them are final, ``[G]`` bool."""
        slots, settings = found.slots, rule.settings
        committing = self.state.committing[slots]
        inside = self.columns < found.sizes.unsqueeze(1)
        canvas = self.canvas[slots]
        state = BlockState(
            canvas, (canvas == self.mask_id) & inside, ~committing, self.step[slots], self.revisions[slots]
        )
        outcome = rule.apply(state, self._propose(rule, found, state, inside))
        is_denoised = state.running & ~outcome.running
        is_stop = (outcome.canvas.unsqueeze(2) == self.stops[slots].unsqueeze(1)).any(2) & inside
        is_last = is_stop.any(1) | (self.done[slots] + found.sizes >= self.limit[slots])
        # A request that ends with this block needs no keys of it; another one gets its keys in a forward of their own.
        emitted = committing | (is_denoised & is_last)
        self.state.committing[slots] = is_denoised & ~emitted
        self.canvas[slots] = outcome.canvas.masked_fill(emitted.unsqueeze(1), settings.mask_token_id)
        self.step[slots] = (state.step + state.running).masked_fill(emitted, 0)
        self.revisions[slots] = outcome.revisions.masked_fill(emitted, 0)
        self.block[slots] += emitted.long()
        self.done[slots] += emitted * found.sizes
        return outcome.canvas, emitted

    def _propose(self, rule: StepRule, found: _Rows, state: BlockState, inside: Tensor) -> Proposal:
        """What the model proposes for all positions; where the context has ended, what is there already."""
        given, shape = rule.settings.given, state.canvas.shape
        if given.suppress_mask_token:
            found.logits[:, self.mask_id] = float("-inf")
        uniform = None
        if given.temperature > 0:
            slots = found.slots
            uniform = uniform_numbers(self.seed[slots], self.block[slots], state.step, self.width).flatten()
        candidates = propose(
            found.logits,
            temperature=given.temperature,
            top_k=given.top_k,
            top_p=given.top_p,
            with_entropy=rule.settings.strategy.needs_entropy,
            uniform=uniform,
        )
        return Proposal(
            candidates.ids.view(shape).where(inside, state.canvas),
            candidates.confidence.view(shape),
            None if candidates.entropy is None else candidates.entropy.view(shape),
        )
