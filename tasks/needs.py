"""Who needs which outputs: working trees, git refs, registered versions. Reads only."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.errors import RLHFError
from rlhf_core.mlflow_writer import open_client, tracking_uri
from tasks import cache
from tasks.network import answers
from tasks.workspace import has_git
from tasks.worktrees import git

DVC_FILES = re.compile(r"(?:^|/)dvc\.lock$|\.dvc$")
SQLITE = "sqlite:///"
PAGE = 1000
MOST_NAMES = 3


@dataclass(frozen=True)
class Need:
    """Outputs that somebody needs: md5 by path."""

    who: str
    outputs: Mapping[str, str]


def merged(needs: Iterable[Need]) -> list[Need]:
    """Those that need the very same become one."""
    by_outputs: dict[frozenset[str], list[Need]] = {}
    for need in needs:
        by_outputs.setdefault(frozenset(need.outputs.values()), []).append(need)
    found = []
    for same in by_outputs.values():
        who = list(dict.fromkeys(need.who for need in same))
        more = f" and {len(who) - MOST_NAMES} more" if len(who) > MOST_NAMES else ""
        found.append(Need(", ".join(who[:MOST_NAMES]) + more, same[0].outputs))
    return found


def trees(home: Path) -> list[Path]:
    """The checkout, its worktrees, those of runs and people's own, and experiments of DVC under way."""
    found = [home, *(path.parent for path in (home / ".dvc" / "tmp" / "exps").glob("*/.dvc"))]
    if not has_git(home):
        return found
    lines = git(home, "worktree", "list", "--porcelain").splitlines()
    listed = [Path(line.removeprefix("worktree ")) for line in lines if line.startswith("worktree ")]
    return found + [path for path in listed if path.resolve() != home.resolve() and (path / ".dvc").is_dir()]


def of_trees(home: Path, without: Collection[Path] = ()) -> Iterator[Need]:
    """What the files of DVC say as they lie in each working tree, committed or not."""
    for root in trees(home):
        if root in without:
            continue
        outputs: dict[str, str] = {}
        for name in _names_in_tree(root):
            try:
                text = (root / name).read_text(encoding="utf-8")
            except FileNotFoundError:
                continue  # deleted here
            outputs |= cache.outputs_of(text, str(root / name))
        shown = root.relative_to(home) if home in root.parents else root
        yield Need(f"working tree {shown}", outputs)


def _names_in_tree(root: Path) -> list[str]:
    if not has_git(root):
        return [
            name for name in ("dvc.lock", *(p.name for p in root.glob("*.dvc"))) if (root / name).is_file()
        ]
    listed = git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    return [name for name in listed if DVC_FILES.search(name) and not name.startswith(".dvc/")]


def of_refs(home: Path, all_commits: bool = False) -> Iterator[Need]:
    """What the last commit of each ref names: branches, those of remotes, tags, stash, DVC's experiments.

    With `all_commits`, every commit that a ref reaches. Raises GitError for a repository that is damaged.
    """
    if not has_git(home):
        return
    form = "%(refname)%09%(objecttype)%(*objecttype)%09%(objectname)"
    commits: dict[str, str] = {}
    for line in git(home, "for-each-ref", f"--format={form}").splitlines():
        name, kind, revision = line.split("\t")
        if kind.endswith("commit"):
            commits.setdefault(revision, name.replace("refs/heads/", "branch ").removeprefix("refs/"))
    for root in trees(home):
        commits.setdefault(git(root, "rev-parse", "HEAD"), f"HEAD of {root}")
    if all_commits:
        for revision in git(home, "rev-list", "--all").splitlines():
            commits.setdefault(revision, f"commit {revision[:10]}")
    for revision, name in commits.items():
        yield Need(name, _committed(home, revision))


@functools.cache
def _committed(home: Path, revision: str) -> dict[str, str]:
    """The outputs that a commit names; a commit never changes."""
    outputs: dict[str, str] = {}
    for path in git(home, "ls-tree", "-r", "-z", "--name-only", revision).split("\0"):
        if DVC_FILES.search(path):
            text = git(home, "cat-file", "blob", f"{revision}:{path}")
            outputs |= cache.outputs_of(text, f"{revision[:10]}:{path}")
    return outputs


def of_versions(home: Path) -> list[Need]:
    """What the tags of each registered version name (tasks/registry.py writes them).

    Raises RLHFError when the registry cannot be asked: what its versions need is not known then.
    """
    uri = tracking_uri(home)
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).exists():
        return []  # asking would make the store
    if uri.startswith("http") and not answers(f"{uri.rstrip('/')}/health"):
        raise RLHFError(
            f"the registry {uri} does not answer, so what its versions need is not known: start it"
        )
    try:
        return [
            Need(f"{version.name} version {version.version}", _tagged(version.tags))
            for version in _versions(open_client(home))
        ]
    except Exception as error:  # SQLAlchemy's, requests' and MLflow's own have no common base
        raise RLHFError(
            f"the registry cannot be asked what its versions need ({type(error).__name__}); start the MLflow "
            "server that MLFLOW_TRACKING_URI names, or unset it"
        ) from error


def _versions(client: Any) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_model_versions(max_results=PAGE, page_token=token)
        yield from page
        if not (token := page.token):
            return


def _tagged(tags: Mapping[str, str]) -> dict[str, str]:
    found = {k.removeprefix("dvc."): v for k, v in tags.items() if k.startswith("dvc.")}
    return {path: md5 for path, md5 in found.items() if path != "lock.md5" and cache.OBJECT.fullmatch(md5)}
