"""How a flow that was started from a shell ends there."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from rlhf_core.errors import RLHFError

GO_ON = "run the same command again to go on"
INTERRUPTED = 130


@contextmanager
def told_in_the_shell(after_interrupt: str = GO_ON) -> Iterator[None]:
    """An expected failure in the block is one line and its exit status; so is Ctrl-C, with `after_interrupt`.

    SIGTERM, which Prefect passes on when it has noted a crash, unwinds like Ctrl-C: a temporary server and
    what else the block started is stopped.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except RLHFError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {after_interrupt}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
