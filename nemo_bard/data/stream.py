"""The stream of samples of a run: which global batch holds which samples, whoever trains on them, and what it depends on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DistributedSampler

CHUNK = 65536
"""Indices that are Python integers at once."""


class StreamSampler(DistributedSampler):
    """Deals the samples of an epoch out to the ranks in turns, from any of its steps on.

    An epoch is an order of the samples. Global batch ``k`` is places ``k * global_batch_size`` to
    ``(k + 1) * global_batch_size - 1`` of it, and place ``p`` is rank ``p % ranks``'s: neither ranks nor local batches nor
    loader workers change what a global batch holds. Behind the last place the first ones come again, so that all ranks
    get equally many samples; ``train.step`` leaves these out.

    Args:
        dataset: Sized.
        ranks: Data-parallel ranks, a divisor of ``global_batch_size``.
        rank: This one.
        global_batch_size: Samples of an optimizer step.
        shuffle: Another order in every epoch; without, the order of the data set.
        drop_last: Leave out the samples behind the last whole global batch of an epoch.

    Raises:
        ValueError: If no global batch is left.
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        ranks: int,
        rank: int,
        global_batch_size: int,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        assert global_batch_size % ranks == 0
        super().__init__(dataset, ranks, rank, shuffle=shuffle)  # pyright: ignore[reportArgumentType] its size is all
        places = len(dataset)
        if drop_last:
            places -= places % global_batch_size
            if not places:
                raise ValueError(
                    f"dataloader.drop_last leaves no step of a data set of {len(dataset)}, fewer than"
                    f" step_scheduler.global_batch_size={global_batch_size}; make that smaller, or drop_last false"
                )
        self.global_batch_size = global_batch_size
        self.drops_last = drop_last
        self.num_samples = math.ceil(places / ranks)
        self.total_size = self.num_samples * ranks
        self._begin = (0, 0)

    def begin_at(self, epoch: int, step: int) -> None:
        """Begin an epoch at one of its steps; every other epoch begins at its first one.

        Args:
            epoch: Number of the epoch.
            step: Steps of it that are done.
        """
        self._begin = (epoch, step * self.global_batch_size)

    def __iter__(self) -> Iterator[int]:
        """Indices of this rank in the epoch of ``set_epoch``."""
        epoch, place = self._begin
        first = self.rank + (place if epoch == self.epoch else 0)
        own = torch.arange(first, self.total_size, self.num_replicas) % len(self.dataset)  # pyright: ignore[reportArgumentType]
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            own = torch.randperm(len(self.dataset), generator=generator)[own]  # pyright: ignore[reportArgumentType]
        for part in own.split(CHUNK):
            yield from part.tolist()


def is_ordered(dataset: Any) -> bool:
    """Whether the order of a data set is its own matter (``ordered = True``), so that nobody shuffles it again."""
    return bool(getattr(dataset, "ordered", False))


def identity_of(dataset: Any) -> dict[str, str]:
    """What the samples of a data set and their order depend on: texts by name, to be compared when a run goes on.

    Args:
        dataset: Sized. Its ``identity()`` says it; without, its ``fingerprint()``; else its class and size count.

    Returns:
        Texts by name; names are what users call things, below ``dataset``.
    """
    if hasattr(dataset, "identity"):
        return {str(name): str(text) for name, text in dataset.identity().items()}
    kind = type(dataset)
    own = dataset.fingerprint() if hasattr(dataset, "fingerprint") else f"{kind.__module__}.{kind.__qualname__}"
    return {"content": own, "samples": str(len(dataset))}
