"""Time, memory, host synchronisations and the ceilings of a device."""

from __future__ import annotations

import multiprocessing
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds and result of one call, the device waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def median_ms(run: Callable[[], Any], device: torch.device, repeat: int, warm_up: int = 2) -> float:
    """Median milliseconds of a call."""
    for _ in range(warm_up):
        run()
    return 1000 * sorted(timed(run, device)[0] for _ in range(repeat))[repeat // 2]


def count_syncs(run: Callable[[], Any], device: torch.device) -> int | None:
    """How often the host waits for the device in one call, as PyTorch counts it; None without CUDA."""
    if device.type != "cuda":
        return None
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)


def device_seconds(run: Callable[[], Any], device: torch.device) -> float | None:
    """Seconds that kernels and copies of one call keep the device busy, as the profiler sees it; None without CUDA."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        timed(run, device)
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def copy_bandwidth(device: torch.device, megabytes: int = 512) -> float:
    """Bytes moved per second, best of five copies (a copy reads as much as it writes, so twice its size moves)."""
    source = torch.empty(megabytes * 2**20 // 4, device=device).fill_(1.0)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(timed(lambda: target.copy_(source), device)[0] for _ in range(5))
    return 2 * source.numel() * 4 / best


def product_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a product of two square matrices of random numbers, the median of five."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / (median_ms(lambda: a @ b, device, repeat=5, warm_up=3) / 1000)


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far, by the operating system's account (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


class PeakMemory:
    """Peak memory above the start of a ``with`` block: the allocator's on CUDA, sampled resident memory elsewhere."""

    def __init__(self, device: torch.device, interval: float = 0.002) -> None:
        self.device, self.interval, self.bytes = device, interval, 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device)
            return self
        self.start = self.peak = resident_bytes()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(self.interval):
            self.peak = max(self.peak, resident_bytes())

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.start
            return
        self.done.set()
        self.thread.join()
        self.bytes = max(self.peak, resident_bytes()) - self.start


class Forked:
    """A function in a forked process of its own, so that the operating system accounts for its memory alone.

    Fork before this process computes anything: OpenMP's threads do not survive a fork.
    """

    def __init__(self, build: Callable[[], Callable[[Any], Any]]) -> None:
        """Fork and call ``build`` there; its result answers ``ask``."""
        context = multiprocessing.get_context("fork")
        self.here, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, build), daemon=True)
        self.process.start()
        there.close()
        self._receive()

    def ask(self, message: Any) -> Any:
        """Call the function there and return its result; RuntimeError with its traceback if it fails."""
        self.here.send(message)
        return self._receive()

    def _receive(self) -> Any:
        try:
            error, result = self.here.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(
                f"the measuring process ended with code {self.process.exitcode} (-9: no memory)"
            ) from None
        if error:
            raise RuntimeError(error)
        return result

    def close(self) -> None:
        """End the process and free its memory."""
        self.here.send(None)  # not by closing: processes forked later hold this end as well
        self.process.join()
        self.here.close()


def _serve(pipe: Any, build: Callable[[], Callable[[Any], Any]]) -> None:
    try:
        function = build()
        pipe.send((None, None))
        while (message := pipe.recv()) is not None:
            pipe.send((None, function(message)))
    except Exception:
        pipe.send((traceback.format_exc(), None))
