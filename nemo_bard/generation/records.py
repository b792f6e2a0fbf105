"""What next-token decoding tells of its forwards: ``StepRecord``s of blocks, so that whoever shows denoising shows it as well."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from nemo_bard.generation.decode import StepRecord


class Recorder:
    """Cuts the response into blocks of ``B``; the steps of a block are the forwards that found tokens of it.

    Args:
        block_size: ``B``.
        mask_token_id: Stands where no token is known.
    """

    def __init__(self, block_size: int, mask_token_id: int) -> None:
        self.block_size, self.mask_token_id = block_size, mask_token_id
        self.steps: dict[tuple[int, int], int] = {}
        """Steps that a block of a row has had."""

    def records(
        self,
        row: int,
        response: Sequence[int],
        confidence: Sequence[float],
        draft: Sequence[int],
        draft_confidence: Sequence[float],
    ) -> list[StepRecord]:
        """The records of a forward, in the order of their blocks.

        Args:
            row: In the batch.
            response: The row's tokens after the forward.
            confidence: Probabilities of those that the forward found, the last ones.
            draft: Tokens behind them that are not certain.
            draft_confidence: Their probabilities.
        """
        size, begin = self.block_size, len(response) - len(confidence)
        blocks = range(begin // size, (len(response) - 1) // size + 1)
        known = [*response, *[self.mask_token_id] * size]
        shown = [*response, *draft, *[self.mask_token_id] * size]
        chances = [*[math.nan] * begin, *confidence, *draft_confidence, *[math.nan] * size]
        fixed = [*[False] * begin, *[True] * len(confidence), *[False] * size]
        found = []
        for block in blocks:
            step = self.steps[row, block] = self.steps.get((row, block), -1) + 1
            own = slice(block * size, (block + 1) * size)
            found.append(
                StepRecord(
                    block=block,
                    step=step,
                    rows=[row],
                    ids=torch.tensor([known[own]]),
                    confidence=torch.tensor([chances[own]]),
                    fixed=torch.tensor([fixed[own]]),
                    draft=torch.tensor([shown[own]]),
                )
            )
        return found
