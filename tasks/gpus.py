"""Which GPUs a run may use. Each is held by one run of this user at a time; another waits for it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

VARIABLE = "CUDA_VISIBLE_DEVICES"
DRIVER = Path("/proc/driver/nvidia/gpus")
POLL_SECONDS = 2.0


def visible() -> list[str]:
    """The GPUs that this process may use, by the names of CUDA_VISIBLE_DEVICES. Loads no library."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(number) for number in range(len(list(DRIVER.glob("*"))))]


@contextlib.contextmanager
def held(wanted: int, on_wait: Callable[[str], None]) -> Iterator[list[str]]:
    """Hold `wanted` of the visible GPUs for the block, or all when there are fewer; their names.

    Waits until they are free, and tells `on_wait` so once. The locks go with the process.
    """
    names = visible()
    wanted = min(wanted, len(names))
    told = False
    while True:
        with contextlib.ExitStack() as stack:
            mine: list[str] = []
            for name in names:
                if len(mine) < wanted and _try_to_hold(name, stack):
                    mine.append(name)
            if len(mine) == wanted:
                yield mine
                return
        if not told:
            told = True
            on_wait(f"waiting for {wanted} of {len(names)} GPUs; other runs hold them")
        time.sleep(POLL_SECONDS)


def _try_to_hold(name: str, stack: contextlib.ExitStack) -> bool:
    directory = Path(tempfile.gettempdir()) / f"rlhf-gpus-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    file = stack.enter_context((directory / f"{name.replace('/', '_')}.lock").open("a"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
