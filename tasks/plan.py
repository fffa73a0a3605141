"""`rlhf plan`: which stages a run would compute, why, and about how long, without running anything.

DVC says what has changed on disk; parameters that are only wished for are compared with the lock file here. A
stage whose inputs another stage may change is listed too: only its turn will tell, and DVC skips it then if
they came out the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from rlhf_core.config import (
    flatten,
    load_params,
    parse_overrides,
    parse_params,
    profile_values,
    put,
    read_yaml,
)
from rlhf_core.data.own_files import link_files
from rlhf_core.errors import RLHFError
from rlhf_core.layout import Layout
from rlhf_core.stages import STAGES
from tasks.worktrees import dvc

MOST_REASONS = 3
SAYS = {
    "modified": "changed",
    "deleted": "is missing",
    "new": "is new",
    "not in cache": "is not in the cache",
}


@dataclass
class Planned:
    """One stage: why it would run (nothing when it would not), and how long it took last time here."""

    stage: str
    reasons: list[str] = field(default_factory=list)
    seconds: float | None = None

    @property
    def runs(self) -> bool:
        return bool(self.reasons)


def plan(root: Path, profile: str, overrides: Sequence[str]) -> list[Planned]:
    """What a run in `root` with these values would do, stage by stage.

    Raises InputError for values that are not valid.
    """
    layout = Layout(root)
    wished = wished_params(layout, profile, overrides)
    stages = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    lock_file = root / "dvc.lock"
    locked = yaml.safe_load(lock_file.read_text(encoding="utf-8"))["stages"] if lock_file.is_file() else {}
    link_files(load_params(layout.params).data, layout)
    status = json.loads(dvc(root, "status", "--json", *stages))
    made_by = {out: name for name, stage in stages.items() for out in _outputs(stage)}
    planned: dict[str, Planned] = {}
    for name in (stage for stage in STAGES if stage in stages):
        found = Planned(name, seconds=_last_seconds(layout, name))
        planned[name] = found
        if name not in locked:
            found.reasons.append("it has not run yet")
            continue
        found.reasons += _changed_params(stages[name].get("params", []), locked[name], wished)
        found.reasons += _changed_files(status.get(name, []))
        upstream = {made_by.get(dep) for dep in stages[name].get("deps", [])}
        found.reasons += [
            f"{o.stage} runs before it" for o in planned.values() if o.runs and o.stage in upstream
        ]
    return list(planned.values())


def wished_params(layout: Layout, profile: str, overrides: Sequence[str]) -> dict[str, Any]:
    """params.yaml with the profile and the overrides put in, checked; the file stays as it is."""
    tree = read_yaml(layout.params)
    values = profile_values(profile, layout.root) if profile else {}
    put(tree, values | parse_overrides(overrides))
    parse_params(tree, str(layout.params))
    return tree


def _outputs(stage: Mapping[str, Any]) -> Iterator[str]:
    for kind in ("outs", "metrics", "plots"):
        for out in stage.get(kind, []):
            yield next(iter(out)) if isinstance(out, dict) else out


def _changed_params(
    keys: Sequence[str], locked: Mapping[str, Any], wished: Mapping[str, Any]
) -> Iterator[str]:
    before = locked.get("params", {}).get("params.yaml", {})
    for key in keys:
        old, new = before.get(key), _at(wished, key)
        if old == new:
            continue
        if not (isinstance(old, dict) and isinstance(new, dict)):
            yield f"{key} was {old}, is {new}"
            continue
        flat_old, flat_new = dict(flatten(old)), dict(flatten(new))
        for leaf in sorted({*flat_old, *flat_new}):
            if flat_old.get(leaf) != flat_new.get(leaf):
                yield f"{key}.{leaf} was {flat_old.get(leaf)}, is {flat_new.get(leaf)}"


def _changed_files(entries: Sequence[Any]) -> Iterator[str]:
    """What `dvc status` says, but for parameters."""
    for entry in entries:
        if isinstance(entry, str):
            yield entry
            continue
        for changes in entry.values():
            for path, how in changes.items():
                if path != "params.yaml":
                    yield f"{path} {SAYS.get(how, how)}"


def _at(tree: Mapping[str, Any], key: str) -> Any:
    node: Any = tree
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _last_seconds(layout: Layout, stage: str) -> float | None:
    try:
        found = json.loads((layout.run_dir(stage) / "perf.json").read_text(encoding="utf-8"))
        return float(found["perf/seconds"])
    except (OSError, ValueError, KeyError):
        return None


def rows(planned: Sequence[Planned]) -> list[dict[str, str]]:
    """The plan as a table of texts."""
    return [
        {
            "stage": item.stage,
            "would": "run" if item.runs else "be skipped",
            "because": "; ".join(_shortened(item.reasons)),
            "took last time": "" if not item.runs else _duration(item.seconds),
        }
        for item in planned
    ]


def summary(planned: Sequence[Planned]) -> str:
    running = [item for item in planned if item.runs]
    if not running:
        return "Nothing to do: every stage is up to date."
    known = [item.seconds for item in running if item.seconds is not None]
    missing = f", {len(running) - len(known)} never ran here" if len(known) < len(running) else ""
    about = (
        f"about {_duration(sum(known))} as these stages took last time{missing}" if known else "time unknown"
    )
    return f"{len(running)} of {len(planned)} stages would run, {about}; less where the cache has a result."


def _shortened(reasons: Sequence[str]) -> list[str]:
    more = len(reasons) - MOST_REASONS
    return [*reasons[:MOST_REASONS], *([f"and {more} more"] if more > 0 else [])]


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def main() -> None:
    parser = argparse.ArgumentParser(prog="rlhf plan", description="What a run would do, and why.")
    parser.add_argument("--profile", default="")
    parser.add_argument("-S", "--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    try:
        planned = plan(Path.cwd(), options.profile, options.overrides)
    except RLHFError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in rows(planned)[0]:
        table.add_column(column, overflow="fold")
    for row in rows(planned):
        table.add_row(*row.values(), style="" if row["would"] == "run" else "dim")
    console = Console()
    console.print(table)
    console.print(summary(planned))


if __name__ == "__main__":
    main()
