"""What runs left beside the cache: worktrees, checkpoints, the state of temporary servers."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlhf_core.layout import Layout
from tasks import worktrees
from tasks.runs import Run, is_held
from tasks.workspace import BusyError, exclusive
from tasks.worktrees import RunPlace

RESUMABLE = "it can go on from there (--stopped frees it)"


@dataclass(frozen=True)
class Leftover:
    """A directory that a run made, and why it stays, where it does."""

    what: str
    path: Path
    size: int
    kept_for: str = ""
    run_id: str = ""  # of a worktree


def find(home: Path, stopped: bool) -> list[Leftover]:
    """Worktrees of runs, checkpoints in the checkout, servers' state; with `stopped` no run is to go on."""
    return [*_worktrees(home, stopped), *_checkpoints(home, stopped), *_servers(home)]


def _worktrees(home: Path, stopped: bool) -> Iterator[Leftover]:
    for root in sorted(Layout(home).worktrees.glob("*")):
        run = Run(root.name, home)
        if is_held(root):
            reason = "it is running"
        elif _alive(run.note.get("process")):
            reason = "its process is still there"
        elif run.state == "finished":
            reason = ""  # all of it is on its branch and in the cache
        else:
            reason = "" if stopped else RESUMABLE
        yield Leftover(f"worktree of run {root.name} ({run.state})", root, size_of(root), reason, root.name)


def _alive(process: object) -> bool:
    """Whether the run's process is there; it pushes to the remote after it has let go of the worktree."""
    return isinstance(process, int) and psutil.pid_exists(process)


def _checkpoints(home: Path, stopped: bool) -> Iterator[Leftover]:
    busy = is_held(home)
    for path in sorted((Layout(home).state / "runs").glob("*/checkpoints")):
        reason = "a run is at work here" if busy else "" if stopped else RESUMABLE
        yield Leftover(f"checkpoints of {path.parent.name} in the checkout", path, size_of(path), reason)


def _servers(home: Path) -> Iterator[Leftover]:
    """flows/own_server.py names them after their process, which removes them unless it is killed."""
    for path in sorted(Layout(home).state.glob("prefect-*")):
        number = path.name.removeprefix("prefect-")
        if number.isdigit() and not psutil.pid_exists(int(number)):
            yield Leftover(f"temporary server of process {number}, which is gone", path, size_of(path))


def remove(home: Path, leftover: Leftover) -> int:
    """Remove it unless a run has begun there; the bytes that went."""
    root = leftover.path if leftover.run_id else home
    is_server = not leftover.run_id and leftover.path.parent == Layout(home).state
    try:
        with contextlib.nullcontext() if is_server else exclusive(root):
            if leftover.run_id:
                worktrees.remove(RunPlace(leftover.run_id, home, leftover.path))
            else:
                shutil.rmtree(leftover.path)
    except BusyError:
        return 0
    return leftover.size


def size_of(directory: Path) -> int:
    """Bytes of the files that have no other name elsewhere; those linked into the cache go on to exist."""
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):
            found = path.lstat()
            if path.is_file() and not path.is_symlink() and found.st_nlink == 1:
                total += found.st_size
    return total
