"""Memory that was freed is used again without asking the system for new pages."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rlhf_core.allocator import SETTINGS

FAULTS = """
import resource, sys
from rlhf_core.allocator import keep_freed
print(keep_freed() if sys.argv[1] == "keep" else False)
import torch
block = lambda: torch.ones(24 * 2**20)  # 96 MiB
for _ in range(20):  # glibc before 2.38 needs some until one fits where another was
    block()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    block()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")


def faults(how: str, **environment: str) -> tuple[bool, int]:
    """Whether the setting was made, and how many new pages five blocks of one size needed."""
    own = (*SETTINGS, "GLIBC_TUNABLES")
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, how],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    made, pages = done.stdout.split()
    return made == "True", int(pages)


@linux_only
def test_freed_blocks_are_used_again() -> None:
    plain, kept = faults("plain")[1], faults("keep")
    if plain < 100:
        pytest.skip("this C library keeps freed blocks by itself")
    assert kept[0]
    assert kept[1] < plain / 20


@linux_only
def test_what_the_environment_says_stays() -> None:
    assert not faults("keep", MALLOC_TRIM_THRESHOLD_="131072")[0]
    assert not faults("keep", GLIBC_TUNABLES="glibc.malloc.trim_threshold=131072")[0]
