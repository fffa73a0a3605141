"""The C library's allocator, told to keep what tensors give back for the tensors that follow.

glibc returns each large block to the system when it is freed, and the system hands out the next one page by
page, each cleared first. A step of full fine-tuning met 219,000 such pages, a fifth of its time
(docs/performance.md). The peak of a training grew by up to 2 %. glibc before 2.38 seldom fits an aligned
block where one of the same size was, so a process with few sizes of large blocks may hold several times as
much.
"""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
NEVER = -1
LARGEST_KEPT = 2**28  # bytes; a larger block is mapped for itself and given back at once
# By which users set the same; what they chose stays.
SETTINGS = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_"


def keep_freed() -> bool:
    """From now on, in this process. False where nothing was changed: the C library is another one, or the
    environment says how its allocator should be."""
    chosen = any(name in os.environ for name in SETTINGS)
    if chosen or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "") or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
