"""`rlhf runs`: the runs that have a branch of their own: list, compare, repeat.

A branch `runs/RUN_ID` holds a run's parameters, lock file and metrics; its state stands in
.rlhf/kept/RUN_ID/run.json. Nothing here needs a server.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from rlhf_core.config import flatten, load_params
from rlhf_core.errors import InputError, RLHFError
from rlhf_core.layout import Layout
from tasks import worktrees
from tasks.stages import stage_environment
from tasks.workspace import check_workspace

# What a list shows of a run; everything is in `compare`.
SHOWN = {
    "reward/accuracy": "RM accuracy",
    "eval/kl": "KL",
    "eval/gold_gain_over_sft": "gold gain",
    "eval/gold_gain_over_sft_low": "its lower bound",
}
MOST_PARAMETERS = 4


@dataclass(frozen=True)
class Run:
    """A run as its branch and its note say it was."""

    run_id: str
    home: Path

    @cached_property
    def note(self) -> dict[str, Any]:
        return worktrees.read_note(self.home, self.run_id)

    @property
    def state(self) -> str:
        """finished, failed, stopped, running, or crashed: it said it was running, and nothing runs."""
        said = str(self.note.get("state", "unknown"))
        root = Layout(self.home).worktrees / self.run_id
        return "crashed" if said in ("running", "new") and not is_held(root) else said

    @cached_property
    def parameters(self) -> dict[str, Any]:
        return dict(flatten(yaml.safe_load(self._file("params.yaml") or "{}")))

    @cached_property
    def outputs(self) -> dict[str, str]:
        """md5 of each output, by path."""
        return {out["path"]: out["md5"] for out in self._lock_entries()}

    @property
    def size(self) -> int:
        """Bytes of all outputs; runs with equal outputs share them."""
        return sum(out.get("size", 0) for out in self._lock_entries())

    @cached_property
    def metrics(self) -> dict[str, float]:
        names = worktrees.git(
            self.home, "ls-tree", "-r", "--name-only", self._branch, "--", "reports"
        ).splitlines()
        found: dict[str, float] = {}
        for name in names:
            if name.endswith("metrics.json"):
                found |= json.loads(self._file(name))
        return found

    @property
    def _branch(self) -> str:
        return worktrees.BRANCHES + self.run_id

    def _lock_entries(self) -> list[dict[str, Any]]:
        stages = (yaml.safe_load(self._file("dvc.lock") or "{}") or {}).get("stages", {})
        return [out for stage in stages.values() for out in stage.get("outs", [])]

    def _file(self, name: str) -> str:
        try:
            return worktrees.git(self.home, "show", f"{self._branch}:{name}")
        except worktrees.GitError:
            return ""  # the run did not get that far


def is_held(root: Path) -> bool:
    """Whether a process works in the workspace `root`."""
    path = Layout(root).state / "lock"
    if not path.is_file():
        return False
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def all_runs(home: Path) -> list[Run]:
    """Newest first."""
    pattern = f"refs/heads/{worktrees.BRANCHES}"
    names = worktrees.git(home, "for-each-ref", "--format=%(refname:lstrip=3)", pattern).splitlines()
    return [Run(name, home) for name in sorted(names, reverse=True)]


def find(home: Path, text: str) -> Run:
    """The one run whose id contains `text`. Raises InputError when there is none, or more than one."""
    wanted = text.removeprefix(worktrees.BRANCHES)
    found = [run for run in all_runs(home) if wanted in run.run_id]
    if exact := [run for run in found if run.run_id == wanted]:
        return exact[0]
    if len(found) != 1:
        which = ", ".join(run.run_id for run in found) or "none"
        raise InputError(f"run {text!r}: must name one run; there are: {which}")
    return found[0]


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Name and both values of everything that differs."""
    names = sorted({*ours, *theirs})
    return [(n, ours.get(n), theirs.get(n)) for n in names if ours.get(n) != theirs.get(n)]


def list_table(runs: Sequence[Run], checkout: Mapping[str, Any]) -> Table:
    """All runs; of their parameters those that differ from the checkout's."""
    table = _table("Runs", "run", "state", "differs from params.yaml here", *SHOWN.values(), "MiB")
    for run in runs:
        changed = [f"{name}={_short(ours)}" for name, ours, _ in differences(run.parameters, checkout)]
        more = [f"and {len(changed) - MOST_PARAMETERS} more"] if len(changed) > MOST_PARAMETERS else []
        table.add_row(
            run.run_id,
            run.state,
            "\n".join([*changed[:MOST_PARAMETERS], *more]),
            *(_short(run.metrics.get(name)) for name in SHOWN),
            f"{run.size / 2**20:.0f}",
        )
    return table


def compare_tables(a: Run, b: Run) -> Iterator[Table]:
    """What differs between two runs: parameters, metrics, outputs."""
    for title, ours, theirs in (
        ("Parameters", a.parameters, b.parameters),
        ("Metrics", a.metrics, b.metrics),
        ("Outputs", a.outputs, b.outputs),
    ):
        table = _table(f"{title} that differ", "", a.run_id, b.run_id)
        for name, mine, other in differences(ours, theirs):
            table.add_row(name, _short(mine), _short(other))
        yield table


def reproduce(run: Run, say: Callable[[str], None]) -> list[tuple[str, str, str]]:
    """Run all stages of `run` again in a worktree; path and both hashes of each output that differs.

    Nothing is taken from the cache. Raises RLHFError when a stage fails; the worktree then stays.
    """
    if not run.outputs:
        raise InputError(f"run {run.run_id}: its branch has no outputs to compare with ({run.state})")
    name = f"repeat-{run.run_id}"
    with worktrees.run_place(run.home, name, worktrees.BRANCHES + run.run_id) as place:
        params = load_params(Layout(place.root).params)
        worktrees.bring_data(place, params)
        env = stage_environment(place.root, params)
        env["RLHF_TRACKING"] = "off"
        say(f"repeating {run.run_id} in {place.root}")
        command = [sys.executable, "-m", "dvc", "repro", "--force", "--no-run-cache"]
        if subprocess.run(command, cwd=place.root, env=env, check=False).returncode != 0:
            raise RLHFError(f"{run.run_id}: the repetition failed; it lies in {place.root}")
    again = Run(name, run.home)
    found = differences(run.outputs, again.outputs)
    worktrees.remove(place)
    return [(path, str(before), str(after)) for path, before, after in found]


def _short(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="rlhf runs", description="Runs that have a branch of their own.")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("list", help="all runs, newest first (the default)")
    for name, words in (("compare", ("a", "b")), ("reproduce", ("a",))):
        command = commands.add_parser(name)
        for word in words:
            command.add_argument(word, metavar="RUN", help="a run's id, or a part that no other has")
    options = parser.parse_args()
    home, console = Path.cwd().resolve(), Console()
    try:
        check_workspace(home)
        if options.command == "compare":
            console.print(*compare_tables(find(home, options.a), find(home, options.b)))
        elif options.command == "reproduce":
            run = find(home, options.a)
            different = reproduce(run, console.print)
            for path, before, after in different:
                console.print(f"{path}: was {before}, is {after}")
            console.print(f"{len(run.outputs) - len(different)} of {len(run.outputs)} outputs are identical")
            sys.exit(3 if different else 0)
        else:
            runs = all_runs(home)
            here = dict(flatten(yaml.safe_load(Layout(home).params.read_text(encoding="utf-8"))))
            console.print(list_table(runs, here) if runs else "no runs yet; `rlhf run --isolated` makes one")
    except RLHFError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    main()
