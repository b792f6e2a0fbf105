"""What the benchmarks share: random-weight models, prompts, memory and bandwidth, tables and result files."""

from __future__ import annotations

import json
import multiprocessing
import platform
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "nemo-automodel", "nemo-bard")


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Device, versions and command of this run."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        model = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
        name = f"{model[0] if model else platform.processor()} ({torch.get_num_threads()} threads)"
    return {
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "command": shlex.join(["python", *sys.argv]),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def resident_bytes() -> int:
    """Resident memory of this process now."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


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


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds and result of one call, the device waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def copy_bandwidth(device: torch.device, megabytes: int = 512) -> float:
    """Bytes read per second, best of five copies (a copy reads as much as it writes, so twice its size moves)."""
    source = torch.empty(megabytes * 2**20 // 4, device=device).fill_(1.0)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(timed(lambda: target.copy_(source), device)[0] for _ in range(5))
    return 2 * source.numel() * 4 / best


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Rows as text; ``columns`` maps a key to ``title|format``."""
    head = [spec.split("|")[0] for spec in columns.values()]
    body = [
        ["-" if row.get(key) is None else format(row[key], spec.split("|")[1]) for key, spec in columns.items()]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in [head, *body]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_results(name: str, output: Path | None, payload: dict[str, Any]) -> Path:
    """Write a result file and return its path."""
    path = output or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(payload, indent=2) + "\n")
    return path


def image_prompt(config: Any, *, rows: int, prompt_tokens: int, image_tokens: int, seed: int) -> dict[str, Tensor]:
    """Random prompts of ``prompt_tokens`` tokens, ``image_tokens`` of them one image each (0 for none).

    Args:
        config: A Qwen3-VL or BARD configuration.
        rows: Batch size.
        prompt_tokens: Tokens per row.
        image_tokens: Image tokens per row; the image is as square as its number of tokens allows.
        seed: Seed of ids and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    low_ids = min(config.image_token_id, config.text_config.vocab_size) - 100
    ids = torch.randint(10, max(low_ids, 11), (rows, prompt_tokens), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if image_tokens:
        merge, patch = config.vision_config.spatial_merge_size, config.vision_config.patch_size
        height = max(h for h in range(1, int(image_tokens**0.5) + 1) if image_tokens % h == 0)
        grid = torch.tensor([[1, height * merge, image_tokens // height * merge]] * rows)
        start = 8
        ids[:, start - 1] = config.vision_start_token_id
        ids[:, start : start + image_tokens] = config.image_token_id
        ids[:, start + image_tokens] = config.vision_end_token_id
        width = config.vision_config.in_channels * config.vision_config.temporal_patch_size * patch * patch
        batch["pixel_values"] = torch.randn(int(grid.prod(-1).sum()), width, generator=generator)
        batch["image_grid_thw"] = grid
    return batch


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far, by the operating system's account (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


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
