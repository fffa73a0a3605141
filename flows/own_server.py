"""Prefect without a server that somebody started: one of our own for the length of a command."""

from __future__ import annotations

import atexit
import os
import shutil
from pathlib import Path

from rlhf_core.cli import QUIET


def prepare(*, apart: bool) -> None:
    """Set what Prefect reads when it is imported, so call this before; a server that is named is left alone.

    Its database stands beside the workspace's other state. Two servers on one database get into each other's
    way, so a command that may run beside others asks for one `apart`, which goes with the process.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    if "PREFECT_API_URL" in os.environ:
        return
    own = f"prefect-{os.getpid()}" if apart else "prefect"
    home = Path(os.environ.setdefault("PREFECT_HOME", str(Path.cwd() / ".rlhf" / own)))
    home.mkdir(parents=True, exist_ok=True)  # Prefect makes the last directory only
    if apart:
        atexit.register(shutil.rmtree, home, ignore_errors=True)
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "ERROR")
    # No flow here uses blocks, and to write down all their types takes such a server two seconds. Nor must it
    # note that they are there: the server of `rlhf up` keeps its own in the same place.
    os.environ.setdefault("PREFECT_SERVER_REGISTER_BLOCKS_ON_START", "false")
    os.environ.setdefault("PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION", "false")
