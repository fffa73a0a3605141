"""The one way to run a command: its own process group, output streamed, a time limit, and nothing left
behind.

DVC starts the stage it runs as a process of its own; a signal to DVC alone would leave the training running.
So the whole tree is ended: TERM, some seconds of grace, KILL.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import psutil

from rlhf_core.parent_death import die_with_parent

GRACE_SECONDS = 15.0  # below the 30 s after which Prefect kills a cancelled run
PROGRESS_SECONDS = 10.0  # between two forwarded states of one progress bar
TAIL_LINES = 40


@dataclass(frozen=True)
class Finished:
    """How a command ended, with its last lines of output."""

    returncode: int
    tail: str
    timed_out: bool = False


def run_command(
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    on_line: Callable[[str], None],
    log_file: Path,
    time_limit: float,
    on_tick: Callable[[], None] | None = None,
    append: bool = False,
) -> Finished:
    """Run `command` to its end or for `time_limit` seconds.

    Each line goes to `on_line` (progress bars thinned), all output to `log_file`, in place of what it held or
    (`append`) after it; `on_tick` is called about once a second. However this function is left, also by an
    exception or a cancelled task, no process stays behind.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=partial(die_with_parent, os.getpid()),
    )
    deadline = time.monotonic() + time_limit
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    timed_out = False
    try:
        with log_file.open("ab" if append else "wb") as log:
            for line in _lines(process, log, deadline, on_tick):
                tail.append(line)
                on_line(line)
        timed_out = process.poll() is None
    finally:
        end_tree(process)
    return Finished(process.returncode, "\n".join(tail), timed_out)


def _lines(
    process: subprocess.Popen, log: BinaryIO, deadline: float, on_tick: Callable[[], None] | None
) -> Iterator[str]:
    """Lines until the command is done or the deadline passes."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    splitter = LineSplitter()
    last_tick = 0.0
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while time.monotonic() < deadline:
            ready = selector.select(timeout=0.5)
            if on_tick and time.monotonic() - last_tick > 1.0:
                last_tick = time.monotonic()
                on_tick()
            chunk = process.stdout.read(65536) if ready else b""
            if chunk:
                log.write(chunk)
                log.flush()
                yield from splitter.feed(chunk)
            elif process.poll() is not None:
                break  # a grandchild may still hold the pipe open; the command itself is done
            elif ready:
                time.sleep(0.1)  # the pipe is closed, and the command goes on without it
    yield from splitter.feed(b"\n")


class LineSplitter:
    """Cuts output into lines. A progress bar's states end with a carriage return; most are dropped."""

    def __init__(self) -> None:
        self._rest = b""
        self._last_progress = 0.0

    def feed(self, chunk: bytes) -> Iterator[str]:
        marked = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n\r")
        *complete, self._rest = (self._rest + marked).split(b"\n")
        for raw in complete:
            text = raw.decode("utf-8", "replace")
            if text.strip() and not (text.startswith("\r") and self._too_soon()):
                yield text.strip()

    def _too_soon(self) -> bool:
        now = time.monotonic()
        if now - self._last_progress < PROGRESS_SECONDS:
            return True
        self._last_progress = now
        return False


def end_tree(process: subprocess.Popen, grace: float = GRACE_SECONDS) -> None:
    """End the process, its group, and every descendant, also one that left the group."""
    found = _tree(process)
    if process.poll() is None or found:
        _signal(process, found, signal.SIGTERM)
        _, alive = psutil.wait_procs(found, timeout=grace)
        if alive or _group_alive(process.pid):
            _signal(process, alive, signal.SIGKILL)
            psutil.wait_procs(alive, timeout=5)
    process.wait()
    if process.stdout:
        process.stdout.close()


def _tree(process: subprocess.Popen) -> list[psutil.Process]:
    """The living processes of the session that the command leads, and all descendants."""
    found: dict[int, psutil.Process] = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        leader = psutil.Process(process.pid)
        for member in [leader, *leader.children(recursive=True)]:
            found[member.pid] = member
    for other in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(other.pid) == process.pid:
                found[other.pid] = other
    alive = (p for p in found.values() if p.is_running())
    return [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def _signal(process: subprocess.Popen, members: Sequence[psutil.Process], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(number)


def _group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def end_orphans(directory: Path, marker: str) -> list[int]:
    """End processes that work in `directory`, have `marker` in their command, and whose parent is gone.

    Such are left when a run is killed by SIGKILL and could not end what it had started.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            here = process.ppid() == 1 and Path(process.cwd()) == directory
            if here and marker in " ".join(process.cmdline()):
                found.append(process)
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(found, timeout=GRACE_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return [process.pid for process in found]
