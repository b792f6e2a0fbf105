"""Memory that a process frees stays its own for the next sample, instead of going to the system and back."""

from __future__ import annotations

import ctypes

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
