"""Losses that go wrong on one rank, for rehearsals."""

import os
import time

import torch

from nemo_bard.method import BlockDiffusionCrossEntropy

RANK = int(os.environ.get("RANK", 0))


class SlowLoss(BlockDiffusionCrossEntropy):
    def per_token_overwriting(self, *args):
        if RANK == 1:
            time.sleep(2.0)
        return super().per_token_overwriting(*args)


class FullLoss(BlockDiffusionCrossEntropy):
    def per_token_overwriting(self, *args):
        if RANK == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return super().per_token_overwriting(*args)
