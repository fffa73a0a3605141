"""Models and data of any run, brought back by the md5 that its registered version names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_core.errors import InputError


def fetch(home: Path, md5: str, target: Path, what: str) -> Path:
    """Put the directory that DVC knows as `md5` at `target`, from the cache or else the default remote.

    Files are checked by their hash, and linked as DVC links them, so they cost no space. Raises InputError,
    naming `what`, when neither place holds it whole.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc_data.hashfile import load
    from dvc_data.hashfile.checkout import CheckoutError, checkout
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_objects.errors import ObjectDBError, ObjectFormatError
    from dvc_objects.fs.local import LocalFileSystem

    info = HashInfo("md5", md5)
    with Repo(str(home)) as repo:
        cache = repo.cache.local
        try:
            if not _is_whole(cache, info):
                repo.cloud.pull([info])
                # The list of a directory's files comes alone, so the files are asked for by name.
                files: Any = load(cache, info)
                repo.cloud.pull([entry for _, _, entry in files])
            target.parent.mkdir(parents=True, exist_ok=True)
            checkout(str(target), LocalFileSystem(), load(cache, info), cache, force=True, quiet=True)
        except (DvcException, CheckoutError, ObjectDBError, ObjectFormatError, OSError) as error:
            raise InputError(
                f"{what}: md5 {md5} is neither in the DVC cache of {home} nor on its remote "
                f"({type(error).__name__}: {error}); bring it with `dvc pull` at the commit that the version "
                "names"
            ) from error
    return target


def _is_whole(cache: Any, info: Any) -> bool:
    """Whether every file is there with the content of its name; a damaged one is put out of the cache."""
    from dvc_data.hashfile import check, load
    from dvc_objects.errors import ObjectFormatError

    try:
        check(cache, load(cache, info))
    except (FileNotFoundError, ObjectFormatError):
        return False
    return True
