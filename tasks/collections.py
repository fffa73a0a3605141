"""`rlhf collections` and `rlhf collect --close ID`: the collections of feedback in this checkout."""

from __future__ import annotations

import argparse
import getpass
import sys
from pathlib import Path

from feedback.store import Store
from feedback.watching import Watched, close_collection, list_collections, progress
from rlhf_core.errors import RLHFError
from tasks.asking import open_store


def line(store: Store, found: Watched) -> str:
    """id, state, votes of wanted, deadline, how prompts were chosen, who answered."""
    state = "open" if found.is_open else f"ended: {found.reason}"
    if found.untold:
        state += ", not told yet"
    votes = progress(store, found.id).votes if found.is_open else found.votes
    until = f"until {found.deadline:%Y-%m-%d %H:%M} UTC" if found.deadline else "no deadline"
    policies = " and ".join(dict.fromkeys(found.about.get("policies", [])))
    choose = found.about.get("choose", "")
    return f"{found.id}  {state}  {votes} of {found.wanted} votes  {until}  {choose}  {policies}"


def list_all(root: Path) -> None:
    with open_store(root) as store:
        lines = [line(store, one) for one in list_collections(store)]
    print("\n".join(lines) or "no collections; `rlhf collect` begins one")


def close(root: Path, project_id: str) -> None:
    with open_store(root) as store:
        before = {one.id: one for one in list_collections(store)}.get(project_id)
        found = close_collection(store, getpass.getuser(), project_id)
    if before is not None and not before.is_open:
        print(f"{found.id}: has ended already ({found.reason}), with {found.votes} votes")
    else:
        print(f"{found.id}: closed with {found.votes} of {found.wanted} votes; they stay, and nobody is told")


def main() -> None:
    parser = argparse.ArgumentParser(prog="rlhf collections", description=__doc__)
    parser.add_argument("--close", default="", metavar="ID")
    options = parser.parse_args()
    try:
        if options.close:
            close(Path.cwd(), options.close)
        else:
            list_all(Path.cwd())
    except RLHFError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
