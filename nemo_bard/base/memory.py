"""Memory of a process: what it frees stays its own for the next sample; what it has read from weight files goes at once."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of glibc's malloc.h
KEPT_BYTES = 64 * 2**20
"""Free memory that a process keeps."""
_LARGEST_BYTES = 32 * 2**20  # what glibc allows on 64 bits


def keep_freed_memory(*_: object) -> None:
    """Let this process keep up to ``KEPT_BYTES`` that it has freed; a loader's ``worker_init_fn``.

    Pixels of a megapixel are 25 MB. Otherwise the C library gives them back and gets them anew, page by page, for every
    sample, which takes a fourth of a worker's time. It is that of glibc; with another one nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_BYTES)
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)


_DONT_NEED = 4  # MADV_DONTNEED of Linux
_MAPS = Path("/proc/self/maps")
SECONDS = 0.1
"""Between two looks at what is mapped."""


@contextmanager
def without_read_pages(files: Iterable[Path]) -> Iterator[None]:
    """While it lasts, pages that this process has read from mapped files do not stay in its memory.

    Weights are read through mapped files. Cast to another dtype they are copied, and until the file is closed both count: for a
    2B checkpoint in bfloat16, loaded in float32, 4 GiB more than it needs. Pages that are read again come from the system's cache.

    Args:
        files: Nothing may write to what is mapped of them: it would be lost. So weights have to be cast, all of them.
    """
    madvise = getattr(ctypes.CDLL(None), "madvise", None) if _MAPS.exists() else None
    names = {str(path.resolve()) for path in files}
    if madvise is None or not names:
        yield
        return
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    ended = threading.Event()

    def release() -> None:
        while not ended.wait(SECONDS):
            for start, length in _mapped(names):
                madvise(start, length, _DONT_NEED)

    thread = threading.Thread(target=release, name="pages of weight files", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _mapped(files: set[str]) -> Iterator[tuple[int, int]]:
    """Where files are mapped: address and length."""
    for line in _MAPS.read_text(errors="replace").splitlines():
        span, *_, name = line.split(maxsplit=5)
        if name in files:
            start, _, end = span.partition("-")
            yield int(start, 16), int(end, 16) - int(start, 16)
