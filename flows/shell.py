"""How a flow that was started from a shell ends there."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_core.cli import INTERRUPTED
from rlhf_core.errors import RLHFError

GO_ON = "run the same command again to go on"


@contextmanager
def told_in_the_shell(after_interrupt: str = GO_ON) -> Iterator[None]:
    """An expected failure in the block is one line and its exit status; so is Ctrl-C, with `after_interrupt`.

    SIGTERM, which Prefect passes on when it has noted a crash, unwinds like Ctrl-C: a temporary server and
    what else the block started is stopped.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except RLHFError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {after_interrupt}", file=sys.stderr)
        sys.exit(INTERRUPTED)
