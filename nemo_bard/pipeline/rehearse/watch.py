"""What a rehearsed training stage is measured with, on every rank: steps, memory, waiting, saving, the data loader."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

from nemo_bard.launch.exits import PREEMPTION_SIGNALS
from nemo_bard.pipeline.world import World
from nemo_bard.upstream import automodel

GIB = 1024**3
LOADER_SECONDS = 10.0
"""How long the loader's speed is measured."""
COLLECTIVES = ("gloo:", "ncclDevKernel", "ncclKernel")
"""How the profiler names what waits for other ranks."""
CLEAR_PEAK = Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step on one rank."""

    seconds: float
    """With every microbatch as long as the median one, so that compiling does not count."""
    whole_seconds: float
    """As it was."""
    tokens: int
    """Positions of its rows, padding included."""
    row_length: int
    """Of its longest row."""
    memory_gib: float
    waiting: float | None
    """Seconds inside collectives; None with one rank."""


@dataclass
class Measured:
    """One training stage on one rank."""

    steps: list[Step] = field(default_factory=list)
    row_length: int | None = None
    """Of the step that was begun last."""
    save_seconds: list[float] = field(default_factory=list)
    rows_per_second: float | None = None
    """What this rank's loader gives, with its workers."""
    loaded: int = 0
    """Rows that this took."""


class Watcher:
    """Follows the recipe of a stage that is rehearsed; called with every recipe that is ready to train.

    Args:
        measured: What it adds to.
        world: The processes.
        stop_after_save: End after the first checkpoint, as a preemption does.
    """

    def __init__(self, measured: Measured, world: World, *, stop_after_save: bool) -> None:
        self.measured, self.world, self.stop_after_save = measured, world, stop_after_save
        self.saved = False
        """Whether a checkpoint was written."""
        self.stopped_from_outside = False
        """Whether a preemption signal came."""
        self._micro: list[float] = []
        self._began = 0.0

    def __call__(self, recipe: Any) -> None:
        """Measure the loader, and put the methods in between."""
        if self.measured.rows_per_second is None and getattr(recipe, "dataloader", None) is not None:
            self._load(recipe)
        self._cuda = has_cuda()
        reset_peak(self._cuda)
        automodel.around_steps(recipe, self._step)
        automodel.around_microbatches(recipe, self._microbatch)
        automodel.around_saving(recipe, self._saving, partial(self._saved, recipe))
        for name in PREEMPTION_SIGNALS:
            self._listen(signal.Signals[name])

    def _listen(self, number: signal.Signals) -> None:
        """Note a signal from outside and pass it on to the recipe's handler, which goes with the recipe."""
        handler = signal.getsignal(number)

        def note(received: int, frame: FrameType | None) -> None:
            self.stopped_from_outside = True
            if callable(handler):
                handler(received, frame)

        signal.signal(number, note)

    # ------------------ steps ------------------
    def _step(self, batches: list[Mapping[str, Any]], run: Callable[[], Any]) -> Any:
        shapes = [batch["input_ids"].shape for batch in batches if "input_ids" in batch]
        self.measured.row_length = row_length = max((int(shape[-1]) for shape in shapes), default=0)
        self._micro.clear()
        begin = time.perf_counter()
        with Recorder(self._cuda, wanted=self.world.size > 1) as recorder:
            result = run()
            _synchronise(self._cuda)
            seconds = time.perf_counter() - begin
        extra = sum(self._micro) - median(self._micro) * len(self._micro) if len(self._micro) > 2 else 0.0
        self.measured.steps.append(
            Step(
                seconds=seconds - max(extra, 0.0),
                whole_seconds=seconds,
                tokens=sum(shape.numel() for shape in shapes),
                row_length=row_length,
                memory_gib=peak_gib(self._cuda),
                waiting=recorder.waiting,
            )
        )
        return result

    def _microbatch(self, run: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = run()
        _synchronise(self._cuda)
        self._micro.append(time.perf_counter() - begin)
        return result

    # ------------------ saving ------------------
    def _saving(self) -> None:
        self._began = time.perf_counter()

    def _saved(self, recipe: Any) -> None:
        self.saved = True
        if self.stop_after_save:
            automodel.end_with_this_step(recipe)
        self.measured.save_seconds.append(time.perf_counter() - self._began)

    # ------------------ the data loader ------------------
    def _load(self, recipe: Any) -> None:
        """Read rows that come behind those of the steps, as fast as the loader can; bad samples end or are dropped."""
        from torch.utils.data import DataLoader

        loader = recipe.dataloader
        size, workers = loader.batch_size or 1, loader.num_workers
        places = list(range(len(loader.dataset) - 1 - self.world.rank, -1, -self.world.size))
        probe = DataLoader(
            loader.dataset, batch_size=size, sampler=places, num_workers=workers, collate_fn=loader.collate_fn
        )
        rejects, times = [], []
        deadline = time.perf_counter() + LOADER_SECONDS
        for batch in probe:
            times.append(time.perf_counter())
            rejects += batch.get("rejects", [])
            if times[-1] > deadline:
                break
        self.measured.loaded = len(times) * size
        self.measured.rows_per_second = size * rate(times, workers)
        if any(self.world.gather(bool(rejects))):
            recipe.bad_samples.settle("train", [{"rejects": rejects}], step=0, epoch=0)


def rate(times: Sequence[float], workers: int) -> float:
    """Batches per second of a loader from when each arrived; those that its workers had begun together do not count."""
    skipped = max(workers, 1) - 1
    if len(times) - skipped < 2:
        skipped = 0
    if len(times) < 2:
        return 0.0
    return (len(times) - skipped - 1) / max(times[-1] - times[skipped], 1e-9)


class Recorder:
    """Adds up the time of a step that its process spends in collectives, most of it waiting for the others."""

    def __init__(self, cuda: bool, *, wanted: bool) -> None:
        self.waiting: float | None = None
        self.profile: Any = None
        if wanted:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it logs where it finds no GPU
            from torch.profiler import ProfilerActivity, profile

            kinds = [ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
            self.profile = profile(activities=kinds, acc_events=True)  # or it warns that events could be lost

    def __enter__(self) -> Recorder:
        if self.profile is not None:
            self.profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.profile is None:
            return
        self.profile.__exit__(*error)
        if error[0] is None:
            spans = [event.time_range for event in self.profile.events() if event.name.startswith(COLLECTIVES)]
            self.waiting = sum(span.elapsed_us() for span in spans) / 1e6


# ------------------ the device ------------------
def has_cuda() -> bool:
    """Whether this process trains on a GPU."""
    import torch

    return torch.cuda.is_available()


def _synchronise(cuda: bool) -> None:
    if cuda:
        import torch

        torch.cuda.synchronize()


def reset_peak(cuda: bool) -> None:
    """Begin a new peak of memory; where the kernel does not let us, it is that of the whole process."""
    if cuda:
        import torch

        torch.cuda.reset_peak_memory_stats()
    elif os.access(CLEAR_PEAK, os.W_OK):
        with contextlib.suppress(OSError):
            CLEAR_PEAK.write_text("5")


def peak_gib(cuda: bool) -> float:
    """Peak of the memory of this rank: allocated on the GPU, else resident."""
    if cuda:
        import torch

        return torch.cuda.max_memory_allocated() / GIB
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1024**2 for line in lines if line.startswith("VmHWM:")), 0.0)


def memory_gib(cuda: bool) -> float:
    """Memory of this rank's GPU, or of the machine."""
    if cuda:
        import torch

        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def device_name(cuda: bool) -> str:
    """What this rank computes on."""
    if cuda:
        import torch

        return torch.cuda.get_device_name()
    return "CPU"
