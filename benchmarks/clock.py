"""Time and memory, on a GPU too: there work is only ordered, so a clock has to wait for it."""

from __future__ import annotations

import resource
import time

import torch


def now() -> float:
    """Seconds, once all that was ordered so far is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gib() -> float:
    """The most memory that tensors took on the GPU, where one is used; else that of the process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # from KiB
