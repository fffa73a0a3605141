"""The checkout that a run works in: one run at a time, under git, its parameters resolved."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rlhf_core.config import (
    Params,
    change_params,
    load_params,
    parse_overrides,
    parse_params,
    profile_values,
    put,
    read_yaml,
)
from rlhf_core.errors import InputError, RLHFError
from rlhf_core.layout import Layout


class BusyError(RLHFError):
    """Another run works in this checkout."""


def resolve_params(root: Path, profile: str, overrides: Sequence[str]) -> Params:
    """Put profile and overrides into params.yaml; raises InputError before anything is changed."""
    layout = Layout(root)
    values = profile_values(profile, root) if profile else {}
    values |= parse_overrides(overrides)
    return change_params(layout.params, values) if values else load_params(layout.params)


def read_params(root: Path, overrides: Sequence[str]) -> Params:
    """params.yaml as it lies in the checkout, with overrides for this command alone; nothing is written."""
    path = Layout(root).params
    tree = read_yaml(path)
    put(tree, parse_overrides(overrides))
    return parse_params(tree, f"{path} with {', '.join(overrides)}" if overrides else str(path))


def check_workspace(root: Path) -> None:
    """Raises InputError when DVC could not work here."""
    if not (root / "dvc.yaml").is_file():
        raise InputError(f"{root}: no dvc.yaml here; run this in the directory of the project")
    no_scm = (root / ".dvc" / "config").is_file() and "no_scm = true" in (
        root / ".dvc" / "config"
    ).read_text().lower()
    if not has_git(root) and not no_scm:
        raise InputError(
            f"{root}: not in a git repository, and DVC keeps its versions in git; clone the project with "
            "git, or run `git init && git add -A && git commit -m start` here"
        )


def has_git(root: Path) -> bool:
    inside = subprocess.run(["git", "rev-parse", "--git-dir"], cwd=root, capture_output=True, check=False)
    return inside.returncode == 0


def exclusive(root: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the checkout for one run. Raises BusyError that names the process which holds it."""
    return held(root, "lock", "another run works here")


@contextlib.contextmanager
def held(root: Path, name: str, doing: str, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock `name` of the checkout `root`, for the block or until this process dies.

    While another process holds it, `doing` says what goes on there: `on_wait` is told, once, and the lock
    waited for; without it, raises BusyError.
    """
    path = Layout(root).state / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            if on_wait is None:
                raise BusyError(f"{root}: {doing} (process {holder}); wait for it, or stop it") from None
            on_wait(f"{doing} (process {holder}); waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
