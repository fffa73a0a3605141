"""`rlhf remote`: is all that dvc.lock names on the DVC remote, and whole?

DVC asks the remote for the list of a directory only, and takes its files to be there: `dvc push` leaves a gap
as it is. Without `verify` it also takes a damaged file for a whole one. Both are looked into here, and mended
from the cache.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rlhf_core.errors import RLHFError
from rlhf_core.redaction import without_secrets
from tasks import cache
from tasks.cache import Cache
from tasks.workspace import check_workspace

CHUNK = 2**20


class RemoteError(RLHFError):
    """The remote lacks something, or cannot be asked. The checkout and the cache are as they were."""


@dataclass(frozen=True)
class Fault:
    """One object of the remote that is missing or damaged, and which file it is."""

    path: str
    md5: str
    what: str

    def __str__(self) -> str:
        return f"{self.path} (md5 {self.md5}) is {self.what} on the remote"


class Remote:
    """The default remote of the checkout `root`. Raises RemoteError when there is none."""

    def __init__(self, root: Path) -> None:
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        self._repo = Repo(str(root))
        self._cache: Cache = cache.of_checkout(root)
        try:
            self._store: Any = self._repo.cloud.get_remote_odb()
        except DvcException as error:
            raise RemoteError(f"no DVC remote to ask: {without_secrets(str(error))}") from None
        self.where = without_secrets(str(self._repo.cloud.get_remote().path))

    def outputs(self) -> dict[str, str]:
        """md5 of each output that DVC keeps, by path: those of dvc.lock and of .dvc files."""
        outs = [out for out in self._repo.index.outs if out.use_cache and out.hash_info]
        return {str(Path(out.fs_path).relative_to(self._repo.root_dir)): out.hash_info.value for out in outs}

    def faults(self, content: bool) -> list[Fault]:
        """What is missing, and with `content` what is damaged; that reads all of the remote's files."""
        try:
            return list(self._faults(content))
        except OSError as error:
            _not_answering(self.where, error)
        except Exception as error:
            if type(error).__module__.partition(".")[0] in (
                "botocore",
                "aiobotocore",
                "aiohttp",
                "dvc_objects",
            ):
                _not_answering(self.where, error)
            raise

    def _faults(self, content: bool) -> Iterator[Fault]:
        wanted: dict[str, str] = {}
        for path, md5 in self.outputs().items():
            wanted[md5] = path
            if md5.endswith(cache.DIRECTORY):
                wanted |= {m: f"{path}/{name}" for name, m in self._members(md5).items()}
        # Not `oids_exist`: on a remote that is a directory, that removes what it finds damaged.
        paths = [self._store.oid_to_path(md5) for md5 in wanted]
        there = {md5 for md5, found in zip(wanted, self._store.fs.exists(paths), strict=True) if found}
        for md5, path in sorted(wanted.items(), key=lambda item: item[1]):
            if md5 not in there:
                yield Fault(path, md5, "missing")
            elif content and (found := self._md5(md5)) != md5.removesuffix(cache.DIRECTORY):
                yield Fault(path, md5, f"damaged (its content has md5 {found})")

    def _members(self, md5: str) -> Mapping[str, str]:
        """From the cache, or from the remote; nothing when that one is missing or damaged, which is a fault
        of its own."""
        if (known := self._cache.members(md5)) is not None:
            return known
        try:
            listing = json.loads(self._store.fs.cat_file(self._store.oid_to_path(md5)))
            return {entry["relpath"]: entry["md5"] for entry in listing}
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return {}

    def _md5(self, md5: str) -> str:
        digest = hashlib.md5()
        with self._store.fs.open(self._store.oid_to_path(md5), "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def mend(self, faults: Iterable[Fault]) -> list[Fault]:
        """Send what is missing or damaged again from the cache; those that the cache has not either.

        The list of a directory goes last: where it is, DVC takes the files to be there.
        """
        from dvc.fs import LocalFileSystem

        left = []
        for fault in sorted(faults, key=lambda one: one.md5.endswith(cache.DIRECTORY)):
            source = self._cache.path(fault.md5)
            if not source.is_file() or md5_of(source) != fault.md5.removesuffix(cache.DIRECTORY):
                left.append(fault)
                continue
            if fault.what != "missing":
                self._store.delete(fault.md5)
            self._store.add(str(source), LocalFileSystem(), fault.md5, check_exists=False)
        return left


def _not_answering(where: str, error: Exception) -> NoReturn:
    raise RemoteError(
        f"the DVC remote {where} cannot be asked: {without_secrets(f'{type(error).__name__}: {error}')}"
    ) from None


def md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def explain(root: Path, most: int = 5) -> str:
    """Which files are bad on the remote, in a few lines; empty when none is, or it cannot be told."""
    try:
        faults = Remote(root).faults(content=True)
    except RLHFError as error:
        return str(error)
    more = [f"and {len(faults) - most} more"] if len(faults) > most else []
    return "; ".join([*map(str, faults[:most]), *more])


def check(root: Path, content: bool, say: Callable[[str], None]) -> int:
    """Say what is wrong with the remote; the number of faults."""
    remote = Remote(root)
    faults = remote.faults(content)
    for fault in faults:
        say(str(fault))
    read = "read" if content else "there (their content was not read; --content does)"
    say(f"{remote.where}: {len(faults)} faults" if faults else f"{remote.where}: all files are {read}")
    if faults:
        say("`rlhf remote mend` sends them again from a checkout whose cache has them")
    return len(faults)


def mend(root: Path, say: Callable[[str], None]) -> int:
    """Send again what is missing or damaged; the number of faults that stay."""
    remote = Remote(root)
    faults = remote.faults(content=True)
    left = remote.mend(faults)
    for fault in left:
        say(f"{fault}, and the cache here does not have it whole either")
    say(f"{remote.where}: {len(faults) - len(left)} of {len(faults)} files mended")
    return len(left)


def main() -> None:
    parser = argparse.ArgumentParser(prog="rlhf remote", description="Look after the DVC remote.")
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("check", help="whether all that dvc.lock and .dvc files name is there")
    look.add_argument("--content", action="store_true", help="read every file and compare its md5")
    commands.add_parser("mend", help="send again from the cache what is missing or damaged")
    options = parser.parse_args()
    root = Path.cwd().resolve()
    try:
        check_workspace(root)
        left = check(root, options.content, print) if options.command == "check" else mend(root, print)
    except RLHFError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(1 if left else 0)


if __name__ == "__main__":
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    main()
