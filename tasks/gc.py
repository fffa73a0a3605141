"""`rlhf gc`: frees what nothing needs any more: objects of the DVC cache, worktrees of runs, checkpoints.

Needed is what a working tree, a git ref (branch, tag, stash, experiment of DVC) or a registered version
names. DVC's own `dvc gc` does not know registered versions. A run that is going on keeps its worktree, and
with it all that its dvc.lock names; while objects are removed, DVC's lock of every worktree is held, and no
run begins.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from rlhf_core.errors import InputError, RLHFError
from tasks import cache, leftovers, needs, worktrees
from tasks.cache import Cache
from tasks.leftovers import Leftover
from tasks.needs import Need
from tasks.workspace import check_workspace

MIB = 2**20
MOST_NAMES = 3


@dataclass(frozen=True)
class Options:
    """What the command was asked for."""

    stopped: bool = False  # also free what a run that was broken off could go on from
    all_commits: bool = False  # keep what any commit of a ref names, not only its last
    others: Sequence[Path] = ()  # other checkouts on the same cache
    alone: bool = False  # a cache that lies elsewhere is used by this checkout only


@dataclass(frozen=True)
class Finding:
    """What is needed and what is not."""

    kept: Mapping[str, set[str]]  # objects in the cache, by who needs them
    lacking: Sequence[str]  # needed directories that are not in the cache, with who needs them
    sizes: Mapping[str, int]  # bytes of every object in the cache
    garbage: frozenset[str]
    leftovers: Sequence[Leftover]

    @property
    def going(self) -> list[Leftover]:
        return [one for one in self.leftovers if not one.kept_for]

    @property
    def freed(self) -> int:
        """Bytes that go."""
        return sum(self.sizes[md5] for md5 in self.garbage) + sum(one.size for one in self.going)


def examine(home: Path, options: Options, versions: Sequence[Need] | None = None) -> Finding:
    """What is needed of the cache and of the worktrees of `home`, and what is not. Changes nothing.

    `versions` are what the registry names, asked for here when they are not given.

    Raises RLHFError when it cannot be told: a registry that does not answer, a dvc.lock that is damaged.
    """
    store = cache.of_checkout(home)
    _check_owners(home, store, options)
    found = leftovers.find(home, options.stopped)
    going = {one.path for one in found if not one.kept_for}
    wanted = list(needs.of_versions(home) if versions is None else versions)
    for root in (home, *options.others):
        wanted += [*needs.of_trees(root, going), *needs.of_refs(root, options.all_commits)]
    sizes = store.objects()
    kept, lacking = {}, []
    for need in needs.merged(wanted):
        objects, absent = _objects(need, store)
        kept[need.who] = objects & sizes.keys()
        lacking += [f"{path} of {need.who}" for path in absent]
    garbage = sizes.keys() - set().union(*kept.values())
    if lacking:  # their lists are not here, so a file of theirs looks like any that nothing names
        garbage = {md5 for md5 in garbage if md5 in _named(garbage, store)}
    return Finding(kept, lacking, sizes, frozenset(garbage), found)


def _check_owners(home: Path, store: Cache, options: Options) -> None:
    inside = store.directory.resolve().is_relative_to(home.resolve())
    if not inside and not options.others and not options.alone:
        raise InputError(
            f"the DVC cache {store.directory} lies outside {home}, so other checkouts may use it: name each "
            "with --with PATH, or say --alone when there is none"
        )


def _objects(need: Need, store: Cache) -> tuple[set[str], list[str]]:
    """md5s of all that is needed, files of directories too; paths of the directories that are not here."""
    found, absent = set(need.outputs.values()), []
    for path, md5 in need.outputs.items():
        if md5.endswith(cache.DIRECTORY):
            members = store.members(md5)
            if members is None:
                absent.append(path)
            found |= set((members or {}).values())
    return found, absent


def _named(garbage: Set[str], store: Cache) -> set[str]:
    """Those of the objects of which we know what they were: outputs, directories and their files."""
    directories = {md5 for md5 in garbage if md5.endswith(cache.DIRECTORY)}
    files = (set((store.members(md5) or {}).values()) for md5 in directories)
    return set().union(directories, store.known_outputs(), *files)


def collect(home: Path, options: Options, listed: Finding) -> int:
    """Free what was listed and is still needed by nothing; the bytes that went.

    Safe beside a run: one that begins meanwhile waits, and one that is going on keeps what it has.
    """
    store = cache.of_checkout(home)
    versions = needs.of_versions(home)  # a server may be slow; DVC's locks are held for as short as possible
    roots = (home, *options.others)
    with contextlib.ExitStack() as stack:
        for root in roots:
            stack.enter_context(worktrees.no_run_begins(root))
        chosen = {one.path for one in listed.going}
        still = [one for one in leftovers.find(home, options.stopped) if one.path in chosen]
        freed = sum(leftovers.remove(home, one) for one in still if not one.kept_for)
        stack.enter_context(cache.locked([tree for root in roots for tree in needs.trees(root)]))
        now = examine(home, options, versions)
        objects = sorted(listed.garbage & now.garbage)
        store.remove(objects)
        return freed + sum(now.sizes[md5] for md5 in objects)


def what_goes(finding: Finding, store: Cache) -> list[tuple[str, int, int]]:
    """What the garbage was: name, number of objects, bytes; the largest first."""
    names = store.known_outputs()
    owner: dict[str, str] = {}
    for md5 in sorted(finding.garbage):
        if md5.endswith(cache.DIRECTORY):
            members = store.members(md5) or {}
            some = sorted(members)[:MOST_NAMES]
            label = names.get(md5, f"a directory of {', '.join(some)}{' ...' if len(members) > 3 else ''}")
            owner |= {md5: label} | {member: label for member in members.values()}
    groups: dict[str, list[int]] = {}
    for md5 in finding.garbage:
        label = owner.get(md5) or names.get(md5, "files of no known output")
        groups.setdefault(label, []).append(finding.sizes[md5])
    rows = [(label, len(sizes), sum(sizes)) for label, sizes in groups.items()]
    return sorted(rows, key=lambda row: -row[2])


def show(finding: Finding, store: Cache, say: Callable[[object], None]) -> None:
    """Two tables: what is kept and why, what goes."""
    from rich import box
    from rich.table import Table

    def table(title: str, *columns: str) -> Table:
        made = Table(
            title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
        )
        for column in columns:
            made.add_column(column, overflow="fold", justify="right" if "MiB" in column else "left")
        return made

    kept = table("Kept", "needed by", "MiB", "MiB for it alone")
    for who, objects in finding.kept.items():
        others = set().union(*(more for other, more in finding.kept.items() if other != who))
        kept.add_row(who, _mib(finding, objects), _mib(finding, objects - others))
    for one in finding.leftovers:
        if one.kept_for:
            kept.add_row(f"{one.what}: {one.kept_for}", f"{one.size / MIB:.1f}", f"{one.size / MIB:.1f}")
    say(kept)
    if finding.lacking:
        some = ", ".join(finding.lacking[:MOST_NAMES]) + (" ..." if len(finding.lacking) > MOST_NAMES else "")
        say(f"Not in the cache here: {some}. Files that nothing names stay, since they may be theirs.")
    goes = table("Goes", "what", "objects", "MiB")
    for label, number, size in what_goes(finding, store):
        goes.add_row(f"cache: {label}", str(number), f"{size / MIB:.1f}")
    for one in finding.going:
        goes.add_row(one.what, "", f"{one.size / MIB:.1f}")
    say(goes if goes.row_count else "Nothing goes: all is needed.")


def _mib(finding: Finding, objects: set[str]) -> str:
    return f"{sum(finding.sizes[md5] for md5 in objects) / MIB:.1f}"


def read_options(arguments: Sequence[str] | None = None) -> tuple[Options, bool]:
    """The options, and whether not to ask."""
    parser = argparse.ArgumentParser(
        prog="rlhf gc",
        description="List, then free, what no branch, tag, working tree, registered version or run needs.",
    )
    parser.add_argument("--yes", action="store_true", help="free it without asking")
    parser.add_argument(
        "--stopped",
        action="store_true",
        help="also checkpoints and worktrees of runs that were stopped, failed or crashed, and could go on",
    )
    parser.add_argument(
        "--all-commits", action="store_true", help="keep what any commit names, not the last only"
    )
    parser.add_argument(
        *("--with", "-w"),
        dest="others",
        action="append",
        default=[],
        type=Path,
        metavar="CHECKOUT",
        help="another checkout on the same cache, whose needs count too; may be repeated",
    )
    parser.add_argument(
        "--alone", action="store_true", help="no other checkout uses a cache that lies elsewhere"
    )
    given = parser.parse_args(arguments)
    for other in given.others:
        check_workspace(other)
    others = [other.resolve() for other in given.others]
    options = Options(given.stopped, given.all_commits, others, given.alone)
    return options, given.yes


def main() -> None:
    from rich.console import Console

    home, console = Path.cwd().resolve(), Console()
    try:
        options, yes = read_options()
        check_workspace(home)
        finding = examine(home, options)
        show(finding, cache.of_checkout(home), console.print)
        if not finding.garbage and not finding.going:
            return
        size = f"{finding.freed / MIB:.1f} MiB"
        if not yes and sys.stdin.isatty():
            yes = input(f"Free {size}? [y/N] ").strip().lower() in ("y", "yes")
        if yes:
            console.print(f"freed {collect(home, options, finding) / MIB:.1f} MiB")
        else:
            console.print(f"nothing was removed; `rlhf gc --yes` frees {size}")
    except RLHFError as error:
        print(f"error: {error}; nothing was removed", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    main()
