"""Prefect without a server that somebody started: one of our own for the length of a command."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from rlhf_core.cli import QUIET
from rlhf_core.errors import RLHFError
from rlhf_core.parent_death import die_with_parent
from rlhf_core.ports import HOST, unused_port
from tasks.network import answers
from tasks.processes import end_tree

APPLICATION = "prefect.server.api.server:create_app"  # in the command of such a server
START_SECONDS = 120
END_SECONDS = 5.0
API_VARIABLE = "PREFECT_API_URL"
HOME_VARIABLE = "PREFECT_HOME"
OWN_VARIABLE = "RLHF_OWN_PREFECT"  # the address of a server that goes with this process


def is_lasting() -> bool:
    """Whether the server is one that somebody started, which is there after this command."""
    return API_VARIABLE in os.environ and os.environ[API_VARIABLE] != os.environ.get(OWN_VARIABLE)


def prepare(*, apart: bool) -> None:
    """Set what Prefect reads when it is imported, so call this before; a server that is named is left alone.

    Its database stands beside the workspace's other state. Two servers on one database get into each other's
    way, so a command that may run beside others asks for one `apart`, which goes with the process.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    if API_VARIABLE in os.environ:
        return
    if HOME_VARIABLE not in os.environ:
        home = Path.cwd() / ".rlhf" / (f"prefect-{os.getpid()}" if apart else "prefect")
        home.mkdir(parents=True, exist_ok=True)  # Prefect makes the last directory only
        os.environ[HOME_VARIABLE] = str(home)
        if apart:
            atexit.register(shutil.rmtree, home, ignore_errors=True)
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", str(START_SECONDS))
    os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "ERROR")
    # No flow here uses blocks, and to write down all their types takes such a server two seconds. Nor must it
    # note that they are there: the server of `rlhf up` keeps its own in the same place.
    os.environ.setdefault("PREFECT_SERVER_REGISTER_BLOCKS_ON_START", "false")
    os.environ.setdefault("PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION", "false")


@contextlib.contextmanager
def starting(*, apart: bool) -> Iterator[None]:
    """As `prepare`, and the server starts while the block imports Prefect; it is there when the block ends.

    Prefect would start the same one, later, and load all of the server's code for it here too. It ends with
    this process, and also when this process is killed. Where Prefect's own settings may name a server, it is
    left to Prefect. Raises RLHFError when the server does not start.
    """
    elsewhere = any(name in os.environ for name in (HOME_VARIABLE, "PREFECT_PROFILE", API_VARIABLE))
    prepare(apart=apart)
    if elsewhere or Path(os.environ[HOME_VARIABLE], "profiles.toml").exists():
        yield
        return
    port = unused_port()
    url = f"http://{HOST}:{port}/api"
    print("starting Prefect's server for this run", file=sys.stderr)
    server = _start(port)
    # Registered before Prefect is imported, so that what Prefect sends on its way out still arrives.
    atexit.register(end_tree, server, END_SECONDS)
    os.environ[API_VARIABLE] = os.environ[OWN_VARIABLE] = url
    os.environ.setdefault("PREFECT_UI_URL", "")  # no page is served there, so none is to be linked
    yield
    _wait(server, url)


def _start(port: int) -> subprocess.Popen:
    spec = importlib.util.find_spec("prefect")
    assert spec is not None
    assert spec.origin is not None
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(Path(spec.origin).parents[1])]
    command += ["--factory", APPLICATION, "--host", HOST, "--port", str(port)]
    return subprocess.Popen(
        [*command, "--log-level", "error", "--lifespan", "on"],
        env=os.environ
        | {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"},
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for this process, which then tells the server of it
        preexec_fn=partial(die_with_parent, os.getpid()),
    )


def _wait(server: subprocess.Popen, url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not answers(f"{url}/health"):
        if server.poll() is not None:
            raise RLHFError(f"Prefect's server ended with status {server.returncode} before it answered")
        if time.monotonic() > deadline:
            raise RLHFError(f"Prefect's server did not answer at {url} within {START_SECONDS} s")
        time.sleep(0.05)
