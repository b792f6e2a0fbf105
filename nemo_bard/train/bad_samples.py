"""What a training run does about bad samples; all ranks decide the same, in the same step."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader

from nemo_bard.data.packing import PackedDataset
from nemo_bard.data.rejects import FILE, KEY, BadSample, BadSamplePolicy, GuardedDataset, RejectsFile, describe

logger = logging.getLogger(__name__)

SECTIONS = {"train": "dataset", "validation": "validation_dataset"}
"""Split, as in the list of rejected samples -> section of the recipe."""


def without_checks(cfg: Any) -> None:
    """Let data sets that check all their samples at the start not do so: bad ones are dropped when they are read.

    Args:
        cfg: The recipe's configuration; ``validate: false`` is written into the sections whose target knows the key.
    """
    for section in SECTIONS.values():
        target = cfg.get(f"{section}._target_", None)
        if callable(target) and "validate" in inspect.signature(target).parameters:
            cfg.set_by_dotted(f"{section}.validate", False)


class BadSamples:
    """The bad samples of a run.

    Args:
        policy: The recipe's ``on_bad_sample``.
        folder: Where the list of dropped samples is kept.
        is_main: Whether this process reads and writes it.
    """

    def __init__(self, policy: BadSamplePolicy, folder: Path, *, is_main: bool) -> None:
        self.policy, self.is_main = policy, is_main
        self.datasets: dict[str, Any] = {}
        found = [RejectsFile(folder / FILE).records if is_main and policy.drops else []]
        if _ranks() > 1:
            dist.broadcast_object_list(found, src=0)
        self.file = RejectsFile(folder / FILE, found[0])

    def guard(self, split: str, loader: DataLoader) -> None:
        """Let the samples of a loader that was not iterated yet come as values even if they are bad."""
        dataset = loader.dataset
        if isinstance(dataset, PackedDataset):
            self.datasets[split] = dataset.dataset
            dataset.dataset = GuardedDataset(dataset.dataset)
        else:
            self.datasets[split] = dataset
            loader.__dict__["dataset"] = GuardedDataset(dataset)  # its own setter refuses; samplers know the size only

    def settle(self, split: str, batches: Iterable[Mapping[str, Any]], *, step: int, epoch: int) -> None:
        """Drop the bad samples of a step, or end the run; called on all ranks if there is one on any.

        Args:
            split: ``train`` or ``validation``.
            batches: This rank's microbatches; those samples are not in them.
            step: Optimizer step.
            epoch: Epoch.

        Raises:
            ValueError: On all ranks, with ``action: error``, or if too many samples are bad.
        """
        own = [asdict(bad) for batch in batches for bad in batch["rejects"]]
        everyones = [own]
        if _ranks() > 1:
            everyones = [[] for _ in range(_ranks())]
            dist.all_gather_object(everyones, own)
        bad = sorted((BadSample(**fields) for part in everyones for fields in part), key=lambda one: one.index)
        dataset = self.datasets[split]
        where = {"split": split, "step": step, "epoch": epoch}
        records = [{**describe(dataset, one), **where} for one in bad]
        if not self.policy.drops:
            more = f" (and {len(records) - 1} more in this step)" if len(records) > 1 else ""
            raise ValueError(f"{_line(records[0])}{more}; mend it, or set {KEY}: drop to go on without such samples")
        new = self.file.add(records, write=self.is_main)
        for record in new if self.is_main else []:
            logger.warning("step %d: a sample is dropped: %s", step, _line(record))
        found, most = self.file.samples(split), self.policy.most(len(dataset))
        if found > most:
            raise ValueError(
                f"{found} of {len(dataset)} samples ({split}) are bad, {KEY} allows {most}; they are listed in"
                f" {self.file.path}; the last one: {_line(records[-1])}"
            )


def _line(record: Mapping[str, Any]) -> str:
    """What is wrong with a sample, and which it is."""
    named = str(record["source"]) in record["reason"]
    return record["reason"] if named else f"{record['source']}: {record['reason']}"


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
