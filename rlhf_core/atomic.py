"""Outputs appear whole or not at all: written beside their place, flushed, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rlhf_core.errors import RLHFError


class DiskFullError(RLHFError):
    """No space was left while something was saved; what stood there before still stands."""


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with saving(path):
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


@contextlib.contextmanager
def staged_dir(final: Path) -> Iterator[Path]:
    """Give an empty directory to fill; it takes the place of `final` only when the block ends well.

    On any exception, also KeyboardInterrupt, `final` stays as it was and the partial directory goes.
    A process that dies leaves `.NAME.partial`, which no reader opens and the next call removes.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.partial")
    old = final.with_name(f".{final.name}.old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        with saving(final):
            yield partial
            _sync_tree(partial)
        if final.exists():
            final.rename(old)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn "no space left" inside the block into one clear error that names `path`."""
    try:
        yield
    except Exception as error:
        if _is_disk_full(error):
            free = shutil.disk_usage(path.parent).free
            raise DiskFullError(
                f"{path}: the disk is full ({free / 2**20:.0f} MiB left); nothing was replaced. "
                "Free some space and run the same command again"
            ) from error
        raise


def _is_disk_full(error: BaseException) -> bool:
    """Libraries written in Rust report ENOSPC as text, inside errors of their own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(error) or "os error 28" in str(error)


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
