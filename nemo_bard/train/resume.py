"""Going on from a checkpoint: the position in the data follows from the step, on any number of ranks.

Checkpoints hold no state of data loaders. They hold what the stream of samples depends on, and a run that would go on with
another stream is refused.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from nemo_automodel.components.training.rng import init_all_rng

from nemo_bard.data.stream import StreamSampler, identity_of, is_ordered
from nemo_bard.train.recipe_file import read_yaml
from nemo_bard.train.validation import ValidatedTraining

logger = logging.getLogger(__name__)

STREAM = "data_stream"
"""File of a checkpoint, and attribute of a recipe, that says what the stream of samples depends on."""
LONGEST = 100
"""Characters of a value in an error."""
RNG = "rng"
"""Folder and attribute of the random states."""
KEYS = {
    "seed": 42,
    "step_scheduler.global_batch_size": None,
    "dataloader.shuffle": True,
    "dataloader.drop_last": False,
    "packing.max_length": None,
}
"""Keys of a recipe that decide the stream, and what they are where they are not written."""


class DataStream:
    """What a stream of samples depends on, kept in checkpoints.

    Args:
        identity: Texts by name; the more telling names first.
    """

    def __init__(self, identity: Mapping[str, str]) -> None:
        self.identity = dict(identity)

    def state_dict(self) -> dict[str, str]:
        """What a checkpoint keeps."""
        return self.identity

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Compare with what a checkpoint keeps.

        Raises:
            ValueError: Names what differs, with both values of the first.
        """
        names = [*self.identity, *(name for name in state if name not in self.identity)]
        differing = [name for name in names if self.identity.get(name) != state.get(name)]
        if not differing:
            return
        first, *others = differing
        before, now = (one.get(first, "nothing") for one in (state, self.identity))
        more = f" (and so {'do' if len(others) > 1 else 'does'} {_one_line(', '.join(others))})" if others else ""
        raise ValueError(
            f"{first} differs from that of the checkpoint's run{more}: {_one_line(before)} then, {_one_line(now)} now; samples"
            " or noise of the next steps would be others: set it back, or start anew in another checkpoint.checkpoint_dir"
        )


class ResumedTraining(ValidatedTraining):
    """The part of a recipe that goes on from a checkpoint; a subclass sets the attributes up."""

    any_ranks: ClassVar[bool] = True
    """It goes on at other numbers of ranks and with other local batches."""
    data_stream: DataStream
    """What this run's samples depend on."""
    _restored: bool = False

    def stream_sampler(self, loader: Any, dataset: Any, rank: int, ranks: int) -> StreamSampler:
        """The sampler of the training set.

        Args:
            loader: Configuration of its loader.
            dataset: The data set, of rows if they are packed.
            rank: Data-parallel rank.
            ranks: Number of them.
        """
        return StreamSampler(
            dataset,
            ranks=ranks,
            rank=rank,
            global_batch_size=self.cfg.get("step_scheduler.global_batch_size"),
            shuffle=loader.shuffle and not is_ordered(dataset),
            drop_last=loader.drop_last,
        )

    def load_checkpoint(self, restore_from: str | None = None) -> None:
        """Load as upstream does, but the place in the data follows from the step.

        Raises:
            ValueError: If the checkpoint's run had another stream of samples.
        """
        self.untrack_state("dataloader", STREAM, RNG)
        dataset = {f"dataset.{name}": text for name, text in identity_of(self.dataloader.dataset).items()}
        self.data_stream = DataStream(settings_of(self.cfg.get) | dataset)
        self.untrack_state(STREAM)
        super().load_checkpoint(restore_from)
        self.data_stream, self.rng = self.data_stream, self.rng  # tracked again: saved with every checkpoint
        self._find_place()

    def restore_state(self, folder: Path) -> Any:
        """Compare the stream of samples, then load; random states only if there are those of as many ranks."""
        file = folder / f"{STREAM}.pt"
        try:
            if file.is_file():
                self.data_stream.load_state_dict(torch.load(file, weights_only=True))
            else:
                self._compare_recipes(folder / "config.yaml")
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        self._restored = True
        self._restore_random_states(folder)
        return super().restore_state(folder)

    def _compare_recipes(self, file: Path) -> None:
        """Compare with the recipe in a checkpoint of a version that did not keep what the samples depend on."""
        old = settings_of(_reader_of(read_yaml(file)))
        known = {name: text for name, text in old.items() if "${" not in text}  # set by the environment then
        DataStream({name: text for name, text in self.data_stream.identity.items() if name in known}).load_state_dict(
            known
        )
        if self.dist_env.is_main:
            logger.warning("%s does not say what its samples were; they are taken to be those of now", file.parent)

    def _restore_random_states(self, folder: Path) -> None:
        """Take up the random states; with other ranks or devices, new ones that follow from seed, step and rank.

        What is drawn from them is dropout; samples and noise have generators of their own.
        """
        files = {file.name: file for file in (folder / RNG).glob(f"{RNG}_global_rank_*.pt")}
        own = files.get(f"{RNG}_global_rank_{self.dist_env.rank}.pt")
        if own is not None and len(files) == self.dist_env.world_size:
            state = torch.load(own, weights_only=True)
            if len(state["cuda_rng_state"]) == torch.cuda.device_count():
                self.rng.load_state_dict(state)
                return
        step = torch.load(folder / "step_scheduler.pt", weights_only=True)["step"]
        digest = hashlib.sha256(f"{self.rng.seed} {step}".encode()).digest()
        init_all_rng(int.from_bytes(digest[:3]), ranked=True)

    def _find_place(self) -> None:
        """Let epoch and sampler follow from the step.

        Raises:
            ValueError: If the checkpoint's step lay in another epoch.
        """
        scheduler = self.step_scheduler
        if not self._restored and not scheduler.step:
            return
        assert scheduler.epoch_len is not None
        epoch, step = divmod(scheduler.step, scheduler.epoch_len)
        # Upstream keeps the epoch of the step that was done last.
        if self._restored and scheduler.epoch not in ((epoch,) if step else (epoch - 1, epoch)):
            raise ValueError(
                f"step {scheduler.step} of the checkpoint was in epoch {scheduler.epoch}, now it would be in epoch {epoch}:"
                " the data set or dataloader.drop_last is another one"
            )
        scheduler.epoch = epoch
        cast("StreamSampler", self.dataloader.sampler).begin_at(epoch, step)


def _one_line(text: str) -> str:
    """A text on one line; of a long one the beginning, and a digest that tells it from others."""
    text = " ".join(text.split())
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


def settings_of(get: Callable[[str, Any], Any]) -> dict[str, str]:
    """The keys of a recipe that decide its stream of samples, as texts; ``get(key, default)`` reads one."""
    values = {key: get(key, default) for key, default in KEYS.items()}
    return {key: str(KEYS[key] if value is None else value) for key, value in values.items()}


def _reader_of(raw: Mapping[str, Any]) -> Callable[[str, Any], Any]:
    def get(dotted: str, default: Any) -> Any:
        section, _, key = dotted.rpartition(".")
        return ((raw.get(section) or {}) if section else raw).get(key, default)

    return get
