"""Python's garbage collector, kept from work that finds nothing.

It looks through everything again for each quarter that large imports add, and once more on the way out: with
torch and transformers a second or more each time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Collect nothing meanwhile, where imports and loaded weights only add what stays."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def leave_all() -> None:
    """What is there now goes with the process, which is about to end."""
    gc.freeze()
