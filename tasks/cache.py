"""The DVC cache as it lies on disk: objects by their md5, and what the run cache knows about them.

An object is a file, or a directory: a list of names and md5s, whose own md5 ends in `.dir`. Nothing here asks
git, and nothing removes an object but `remove`.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf_core.errors import InputError, RLHFError

OBJECT = re.compile(r"[0-9a-f]{32}(\.dir)?")
DIRECTORY = ".dir"
LOCK_SECONDS = 120.0  # how long DVC may work in a checkout before we give up


@dataclass(frozen=True)
class Cache:
    """The cache below `directory`."""

    directory: Path

    def path(self, md5: str) -> Path:
        return self.directory / "files" / "md5" / md5[:2] / md5[2:]

    def objects(self) -> dict[str, int]:
        """Size in bytes of each object. What DVC is still writing has another name, and is left out."""
        found = {}
        for path in self.directory.glob("files/md5/??/*"):
            md5 = path.parent.name + path.name
            if OBJECT.fullmatch(md5):
                with contextlib.suppress(FileNotFoundError):
                    found[md5] = path.stat().st_size
        return found

    def members(self, md5: str) -> dict[str, str] | None:
        """md5 of each file of a directory, by name; None when the directory is not in the cache.

        Raises RLHFError for one that is damaged.
        """
        path = self.path(md5)
        try:
            return {entry["relpath"]: entry["md5"] for entry in json.loads(path.read_bytes())}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise RLHFError(
                f"{path}: the list of a directory in the DVC cache is damaged ({error}); remove it, and "
                "`dvc fetch` brings it from the remote"
            ) from None

    def known_outputs(self) -> dict[str, str]:
        """Path of each output that the run cache names, by md5."""
        found: dict[str, str] = {}
        for entry in self.directory.glob("runs/??/*/*"):
            with contextlib.suppress(OSError, yaml.YAMLError, AttributeError, TypeError, KeyError):
                outs = yaml.safe_load(entry.read_text(encoding="utf-8")).get("outs", [])
                found |= {out["md5"]: out["path"] for out in outs if "md5" in out}
        return found

    def remove(self, md5s: Sequence[str]) -> None:
        """Directories first: one that is left must not lack files."""
        for md5 in sorted(md5s, key=lambda name: not name.endswith(DIRECTORY)):
            self.path(md5).unlink(missing_ok=True)


def of_checkout(home: Path) -> Cache:
    """The cache that DVC uses in `home`."""
    from dvc.config import Config

    config = Config(str(home / ".dvc"), validate=False)  # relative paths come out absolute
    return Cache(Path(config.get("cache", {}).get("dir") or home / ".dvc" / "cache"))


def outputs_of(text: str, where: str) -> dict[str, str]:
    """md5 of each output, by path, of a dvc.lock or a .dvc file.

    Raises InputError that names `where` when the text is neither.
    """
    try:
        content = yaml.safe_load(text) or {}
        stages: Sequence[Mapping[str, Any]] = (
            [content] if "outs" in content else list((content.get("stages") or {}).values())
        )
        outs = [out for stage in stages for out in stage.get("outs") or []]
        return {str(out["path"]): str(out["md5"]) for out in outs if "md5" in out}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{where}: not a file of DVC: {' '.join(str(error).split())[:200]}") from None


@contextlib.contextmanager
def locked(roots: Sequence[Path]) -> Iterator[None]:
    """Hold DVC's own lock of each checkout: none of them puts anything into the cache, or takes it out.

    A stage's command runs without that lock; what it makes is put into the cache, and noted in dvc.lock,
    under one hold of it. All locks are taken or none, so that nobody waits for us while we wait.

    Raises RLHFError when DVC works on in one of them for `LOCK_SECONDS`.
    """
    from dvc.lock import LockError

    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        with contextlib.ExitStack() as stack:
            busy = None
            for root in roots:
                try:
                    stack.enter_context(_lock_of(root))
                except LockError:
                    busy = root
                    break
            if busy is None:
                yield
                return
        if time.monotonic() > deadline:
            raise RLHFError(f"{busy}: DVC is at work there; try again when it is done")
        time.sleep(1.0)


def _lock_of(root: Path) -> Any:
    from dvc.config import Config
    from dvc.lock import make_lock

    directory = root / ".dvc" / "tmp"
    directory.mkdir(parents=True, exist_ok=True)
    hardlink = Config(str(root / ".dvc"), validate=False).get("core", {}).get("hardlink_lock", False)
    return make_lock(str(directory / "lock"), tmp_dir=str(directory), hardlink_lock=hardlink)
