"""What the machines are like, apart from the chain: the file system of the run directory, and the network."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from nemo_bard.pipeline.world import World

MIB = 1024**2
PROBED_MIB = 64
"""Written to measure the file system, and reduced to measure the network."""
REPEATS = 5
OK = "ok"
TAKEN = "taken"


@dataclass(frozen=True, kw_only=True)
class FileFindings:
    """A file system as one node sees it."""

    node: str
    sees_folder: bool
    """Whether a file that rank 0 wrote is there; nothing else is known if not."""
    lock: str = OK
    """``ok``, or why ``flock`` does not work."""
    lock_is_shared: bool | None = None
    """Whether the lock that another node holds is seen; None on the node that holds it, or where locks do not work."""
    rename: str = OK
    """``ok``, or why a file cannot replace another one at once."""
    hard_links: str = OK
    """``ok``, or why not."""
    fsync_ms: float = 0.0
    """Median time to bring a small file onto the disk."""
    write_mib_s: float = 0.0
    """Speed of a file of ``PROBED_MIB`` MiB, brought onto the disk."""
    free_gib: float = 0.0


@dataclass(frozen=True, kw_only=True)
class NetworkFindings:
    """What a collective costs; the slowest rank's figures."""

    backend: str
    ranks: int
    nodes: int
    allreduce_ms: float
    """Median time of an all-reduce of ``PROBED_MIB`` MiB."""
    bus_gb_s: float
    """Its bus bandwidth: ``2 (n - 1) / n`` of the bytes per second, in GB."""
    latency_ms: float
    """Median time of an all-reduce of four bytes."""


def probe_files(world: World, scratch: Path) -> list[FileFindings]:
    """Probe the file system from one process of every node.

    Args:
        world: The processes; all of them call this.
        scratch: A folder that rank 0 has made.

    Returns:
        What each node found, the first one first, on every rank.
    """
    folder, node = scratch / "probe", platform.node()
    held = folder / "held"
    if world.is_main:
        folder.mkdir(exist_ok=True)
        held.touch()
    world.barrier()
    with _Holder(held if world.is_main else None) as holder:
        lock = world.gather(holder.outcome)[0]
        found = None
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            found = FileFindings(node=node, sees_folder=False)
            if held.is_file():
                seen = _try_lock(held) == TAKEN if lock == OK and not world.is_main else None
                found = _probe_node(folder / f"rank{world.rank}", node, lock, seen)
        results = [one for one in world.gather(found) if one is not None]
    if world.is_main:
        shutil.rmtree(folder)
    return results


class _Holder:
    """Holds the lock of a file, if given one; ``outcome`` says how that went."""

    def __init__(self, path: Path | None) -> None:
        self.file = None if path is None else path.open("a")
        self.outcome = "" if self.file is None else _flock(self.file)

    def __enter__(self) -> _Holder:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()


def _flock(file: Any) -> str:
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return TAKEN
    except OSError as error:
        return error.strerror or type(error).__name__
    return OK


def _try_lock(path: Path) -> str:
    with path.open("a") as file:
        return _flock(file)


def _probe_node(own: Path, node: str, lock: str, seen: bool | None) -> FileFindings:
    own.mkdir()
    small, other, large = own / "small", own / "other", own / "large"
    fsync = median(_write(small, b"x" * 4096) for _ in range(REPEATS))
    return FileFindings(
        node=node,
        sees_folder=True,
        lock=lock,
        lock_is_shared=seen,
        rename=_tried(lambda: _replace(small, other)),
        hard_links=_tried(lambda: os.link(other, own / "link")),
        fsync_ms=1000 * fsync,
        write_mib_s=PROBED_MIB / _write(large, bytes(PROBED_MIB * MIB)),
        free_gib=shutil.disk_usage(own).free / 1024**3,
    )


def _write(path: Path, content: bytes) -> float:
    begin = time.perf_counter()
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return max(time.perf_counter() - begin, 1e-9)


def _replace(path: Path, target: Path) -> None:
    target.write_bytes(b"old")
    content = path.read_bytes()
    path.replace(target)
    if target.read_bytes() != content:
        raise OSError(0, "the old file is still there")


def _tried(call: Callable[[], object]) -> str:
    try:
        call()
    except OSError as error:
        return error.strerror or type(error).__name__
    return OK


def probe_network(world: World) -> NetworkFindings | None:
    """Time all-reduces in the group that training uses; None with one process. All processes call this."""
    if world.size == 1:
        return None
    import torch
    from torch import distributed

    backend = distributed.get_backend()
    device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
    large = torch.ones(PROBED_MIB * MIB // 4, device=device)
    small = torch.ones(1, device=device)

    def seconds(tensor: Any) -> float:
        times = []
        for _ in range(REPEATS + 1):
            begin = time.perf_counter()
            distributed.all_reduce(tensor)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return median(times[1:])  # the first one connects

    told = world.gather((seconds(large), seconds(small), platform.node()))
    reduce, latency = max(one[0] for one in told), max(one[1] for one in told)
    return NetworkFindings(
        backend=str(backend),
        ranks=world.size,
        nodes=len({one[2] for one in told}),
        allreduce_ms=1000 * reduce,
        bus_gb_s=2 * (world.size - 1) / world.size * PROBED_MIB * MIB / reduce / 1e9,
        latency_ms=1000 * latency,
    )
