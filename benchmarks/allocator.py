"""Keep freed memory, for every provider alike, so that a CPU time does not count page faults.

glibc returns each large block to the kernel when it is freed and faults it in again, zeroed, page
by page: up to a third of a small training step. It slows eager PyTorch as much as these kernels.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc, malloc.h


def keep_freed_memory() -> str:
    """Turn it on for this process; returns the sentence for a result's header."""
    if not sys.platform.startswith("linux"):
        return "the platform's default"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return "the C library's default (it has no mallopt)"
    # No block of its own by mmap, and the heap never shrinks.
    kept = mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    if not kept:
        return "the C library's default (mallopt refused)"
    return "mallopt keeps freed memory, for all providers alike"
