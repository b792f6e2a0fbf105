"""What a denoising step does to a block, once the model has proposed tokens: which are fixed, which are revised, what goes on.

Everything is a function of tensors that nothing reads on the host, so that the loop of ``decode`` and a captured CUDA graph
do the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nemo_bard.generation.resolve import DecodeSettings
from nemo_bard.generation.sampling import tokens_per_step
from nemo_bard.generation.strategies import StepState


class BlockState(NamedTuple):
    """The current block of ``N`` rows before a step."""

    canvas: Tensor
    """Token ids, ``[N, B]``; the mask id where a token is masked."""
    is_masked: Tensor
    """``[N, B]`` bool."""
    running: Tensor
    """Rows that take the step, ``[N]`` bool; the others stay as they are."""
    step: Tensor
    """Steps that the block has had, ``[N]`` int64."""
    revisions: Tensor
    """Steps that the block has had since its last mask was gone, ``[N]`` int64."""


class Proposal(NamedTuple):
    """What the model proposes, each ``[N, B]``; what it holds where nobody asked does not matter."""

    ids: Tensor
    confidence: Tensor
    """Probabilities."""
    entropy: Tensor | None
    """In nats; None unless the strategy needs it."""


class StepOutcome(NamedTuple):
    """The block after a step."""

    canvas: Tensor
    """``[N, B]``."""
    is_masked: Tensor
    """``[N, B]`` bool."""
    running: Tensor
    """Rows whose block has another step, ``[N]`` bool."""
    revisions: Tensor
    """``[N]`` int64."""
    changed: Tensor
    """Tokens that the step fixed or replaced, ``[N, B]`` bool."""
    confidence: Tensor
    """Of the proposals, -inf where nobody asked, ``[N, B]``."""
    first_end: Tensor
    """Column of the first end id in the block, ``B`` if there is none, ``[N]`` int64."""


class StepRule:
    """The rule of one call of ``generate``."""

    def __init__(self, settings: DecodeSettings, device: torch.device) -> None:
        """Prepare the constants of a rule.

        Args:
            settings: Those of the call.
            device: Where the tensors are.
        """
        self.settings = settings
        quotas = tokens_per_step(settings.block_size, settings.denoising_steps)
        self.quotas, self.ends = (
            torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)
            for numbers in (quotas, settings.end_ids)
        )
        self.columns = torch.arange(settings.block_size, device=device)

    @property
    def is_editing(self) -> bool:
        """Whether visible tokens of the block may be replaced."""
        return self.settings.given.edit_threshold is not None

    def wanted(self, state: BlockState) -> Tensor:
        """Where a step needs proposals, ``[N, B]`` bool."""
        asked = torch.ones_like(state.is_masked) if self.is_editing else state.is_masked
        return asked & state.running.unsqueeze(1)

    def apply(self, state: BlockState, proposal: Proposal, quota: int | None = None) -> StepOutcome:
        """Take the step.

        Args:
            state: The block.
            proposal: What the model says to it.
            quota: Tokens the even split gives to the step, if all rows are at the same one; else it is looked up.
        """
        settings, given = self.settings, self.settings.given
        canvas, is_masked, running, step, revisions = state
        confidence = proposal.confidence.masked_fill(~self.wanted(state), float("-inf"))
        entropy = proposal.entropy
        if entropy is not None:
            entropy = entropy.masked_fill(~is_masked, float("inf"))
        due = quota
        if due is None:
            due = self.quotas[step.clamp_max(len(self.quotas) - 1)].unsqueeze(1)
        chosen = settings.strategy.fix(
            StepState(confidence.masked_fill(~is_masked, float("-inf")), entropy, is_masked, due)
        )
        is_last = step + 1 >= settings.denoising_steps
        if given.suppress_mask_token:
            chosen = chosen | is_last.unsqueeze(1)  # whatever a strategy leaves, no mask id comes out
        allowed = running.unsqueeze(1) & (proposal.ids != settings.mask_token_id)
        changed = chosen & is_masked & allowed
        still_masked = is_masked & ~changed
        unfinished = still_masked.any(1)
        goes_on = unfinished & ~is_last
        if given.edit_threshold is not None:
            edited = ~is_masked & (proposal.ids != canvas) & (confidence > given.edit_threshold) & allowed
            was_done = ~is_masked.any(1)
            revisions = revisions + (was_done & running)
            changed = changed | edited
            # Revision may go on after the last mask: at first unconditionally, then as long as something changes.
            again = running & ~unfinished & (revisions < given.max_post_edit_steps)
            goes_on = goes_on | (again & (~was_done | changed.any(1)))
        canvas = torch.where(changed, proposal.ids, canvas)
        is_end = (canvas.unsqueeze(2) == self.ends).any(2)
        first_end = torch.where(is_end, self.columns, settings.block_size).amin(1)
        return StepOutcome(canvas, still_masked, goes_on & running, revisions, changed, confidence, first_end)
