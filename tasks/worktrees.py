"""A run in a git worktree of its own, on a branch `runs/RUN_ID`, beside the checkout that started it.

Two runs never touch each other's files: each has its parameters, lock file and outputs, at the revision that
it was started from. What they share is the DVC cache, so a stage that one has computed the other takes over.
The branch keeps what is needed to repeat the run; its logs and report pages are kept beside the checkout.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf_core.atomic import write_text
from rlhf_core.config import Params
from rlhf_core.errors import InputError, RLHFError
from rlhf_core.layout import Layout
from rlhf_core.redaction import without_secrets
from tasks import remote
from tasks.cache import of_checkout
from tasks.workspace import exclusive

BRANCHES = "runs/"
# What a branch keeps of a run. Everything else is in the DVC cache, by the hashes of dvc.lock.
RECORDED = ("params.yaml", "dvc.lock", "reports", "data/feedback.dvc", "models/champion.dvc")
# Who commits where git knows nobody.
NOBODY = ("-c", "user.name=rlhf pipeline", "-c", "user.email=rlhf@localhost")


class GitError(RLHFError):
    """A git command failed."""


class DataError(RLHFError):
    """DVC could not bring or send data; nothing was lost by it."""


@dataclass(frozen=True)
class RunPlace:
    """Where a run works: `root` is the worktree, `home` the checkout that it belongs to."""

    run_id: str
    home: Path
    root: Path

    @property
    def branch(self) -> str:
        return BRANCHES + self.run_id

    @property
    def kept(self) -> Path:
        """What stays when the worktree is gone: logs, report pages, the state of the run."""
        return kept_dir(self.home, self.run_id)


def kept_dir(home: Path, run_id: str) -> Path:
    return Layout(home).state / "kept" / run_id


def run_id_of(home: Path, flow_run_id: str) -> str:
    """The time a run began with the start of its flow run's id; a retry of that flow run finds the same."""
    short = flow_run_id.replace("-", "")[:8]
    kept = Layout(home).state / "kept"
    for found in sorted(kept.glob(f"*-{short}")):
        return found.name
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{short}"


@contextlib.contextmanager
def run_place(home: Path, run_id: str, revision: str) -> Iterator[RunPlace]:
    """A worktree for the block, at `revision`; when that is empty, at HEAD with params.yaml as it lies here.

    A run that was broken off before its end is taken up again, its checkpoints with it. However the block
    ends, what was reached is committed on the run's branch; the worktree stays until `remove`.

    Raises InputError for a revision that git does not know, and BusyError when the run is going on already.
    """
    place = RunPlace(run_id, home, Layout(home).worktrees / run_id)
    with contextlib.ExitStack() as stack:
        with _collection_lock(home, fcntl.LOCK_SH):
            if not (place.root / ".git").exists():
                _make_worktree(place, revision)
            stack.enter_context(exclusive(place.root))
        share_cache(place)
        note(place, state="running", revision=git(place.root, "rev-parse", "HEAD"), process=os.getpid())
        try:
            yield place
        except BaseException as error:
            with contextlib.suppress(GitError):
                record(place, f"Run {run_id}, broken off")
            state = "failed" if isinstance(error, Exception) else "stopped"
            note(place, state=state, reason=str(error)[:500])
            raise
        record(place, f"Run {run_id}", even_empty=False)
        note(place, state="finished", ended=_now())


def no_run_begins(home: Path) -> contextlib.AbstractContextManager[None]:
    """For the block, a run that wants a worktree of `home` waits before it makes or takes one."""
    return _collection_lock(home, fcntl.LOCK_EX)


@contextlib.contextmanager
def _collection_lock(home: Path, kind: int) -> Iterator[None]:
    path = Layout(home).state / "gc.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, kind)
        yield


def _make_worktree(place: RunPlace, revision: str) -> None:
    git(place.home, "worktree", "prune")
    known = git(place.home, "branch", "--list", place.branch)
    if known:
        git(place.home, "worktree", "add", "-q", str(place.root), place.branch)
    else:
        commit = _commit_of(place.home, revision or "HEAD")
        git(place.home, "worktree", "add", "-q", "-b", place.branch, str(place.root), commit)
        if not revision:
            shutil.copyfile(Layout(place.home).params, Layout(place.root).params)
    note(place, started=_now(), state="new")


def _commit_of(home: Path, revision: str) -> str:
    try:
        return git(home, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    except GitError:
        raise InputError(
            f"revision {revision!r}: git knows no such branch, tag or commit in {home}"
        ) from None


def share_cache(place: RunPlace) -> None:
    """Point DVC in the worktree to the checkout's cache and remotes; relative paths would miss from here."""
    from dvc.config import Config

    local = Path(".dvc") / "config.local"
    if (place.home / local).is_file():  # credentials, remotes of this machine
        shutil.copyfile(place.home / local, place.root / local)
    there = Config(str(place.home / ".dvc"), validate=False)  # relative paths come out absolute
    with Config(str(place.root / ".dvc"), validate=False).edit("local") as here:
        here.setdefault("cache", {})["dir"] = str(of_checkout(place.home).directory)
        for name, settings in there.get("remote", {}).items():
            if "://" not in str(settings["url"]):
                here.setdefault("remote", {}).setdefault(name, {})["url"] = str(settings["url"])
            # Without it DVC takes a damaged file for a whole one.
            here.setdefault("remote", {}).setdefault(name, {})["verify"] = True


def bring_data(place: RunPlace, params: Params) -> None:
    """Bring what was put under DVC by `dvc add` into the worktree, from the cache or the remote.

    Raises DataError when neither holds it, and InputError for a source that lies in the checkout but is no
    part of the revision.
    """
    if tracked := git(place.root, "ls-files", "*.dvc").splitlines():
        try:
            dvc(place.root, "pull", *tracked)
        except DataError as error:
            raise DataError(f"{error}\n{remote.explain(place.root)}".strip()) from None
    for key in ("demonstrations", "preferences", "prompts"):
        for source in getattr(params.data, key):
            path = Path(source)
            missing = not path.is_absolute() and not (place.root / path).exists()
            if missing and (place.home / path).exists():
                raise InputError(
                    f"data.{key}: {source} is in {place.home}, but neither in git nor in DVC, so a run in a "
                    f"worktree does not see it: `dvc add {source}` and commit, or give its absolute path"
                )


def push(place: RunPlace) -> bool:
    """Send what the run made, and how DVC finds it again, to the remote; False when none is set.

    DVC takes a directory that was sent before to be whole there; what has gone missing since is sent again.
    Raises DataError when that fails.
    """
    if not dvc(place.root, "remote", "list"):
        return False
    dvc(place.root, "push", "-q", "--run-cache")
    store = remote.Remote(place.root)
    if left := store.mend(store.faults(content=False)):
        raise DataError(f"{left[0]}, and not in the cache here ({len(left)} such files)")
    return True


def record(place: RunPlace, message: str, *, even_empty: bool = True) -> None:
    """Commit parameters, lock file and reports on the run's branch; without `even_empty` only a change."""
    present = [name for name in RECORDED if (place.root / name).exists()]
    git(place.root, "add", "--", *present)
    if not even_empty and not git(place.root, "diff", "--cached", "--name-only"):
        return
    identity = () if git(place.root, "config", "--default", "", "user.email") else NOBODY
    git(place.root, *identity, "commit", "-q", "--no-verify", "--allow-empty", "-m", message)


def keep_stage(source: Layout, target: Layout, stage: str) -> None:
    """Copy a stage's log, tables and report page to where they outlive the worktree."""
    logs = target.run_dir(stage)
    logs.mkdir(parents=True, exist_ok=True)
    for path in source.run_dir(stage).glob("*"):
        if path.is_file():
            shutil.copyfile(path, logs / path.name)
    for page in (source.metrics(stage).parent, source.validation, source.evaluation):
        if page.is_dir():
            shutil.copytree(page, target.root / page.relative_to(source.root), dirs_exist_ok=True)


def remove(place: RunPlace) -> None:
    """Take the worktree away. The branch, the cache and what is kept stay."""
    git(place.home, "worktree", "remove", "--force", str(place.root))


def note(place: RunPlace, **facts: object) -> None:
    """Add to the state of the run, kept/RUN_ID/run.json."""
    path = place.kept / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(read_note(place.home, place.run_id) | facts, indent=2) + "\n")


def read_note(home: Path, run_id: str) -> dict[str, Any]:
    try:
        found = json.loads((kept_dir(home, run_id) / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def dvc(where: Path, *arguments: str) -> str:
    """The output of a DVC command. Raises DataError with its last words."""
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments]
    env = os.environ | {"DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = without_secrets((done.stderr or done.stdout).strip())[-600:]
        raise DataError(f"dvc {' '.join(arguments[:6])}: {words}")
    return done.stdout.strip()


def git(where: Path, *arguments: str) -> str:
    """The output of a git command, without the line break at its end. Raises GitError with git's words."""
    done = subprocess.run(["git", *arguments], cwd=where, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise GitError(f"git {' '.join(arguments[:6])}: {done.stderr.strip() or done.returncode}")
    return done.stdout.strip()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
