"""`rlhf run`: the flow `train` here and now, with no server that somebody started.

Nothing here imports Prefect before its server is on the way, which makes its database meanwhile.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from flows import own_server
from flows.shell import told_in_the_shell
from rlhf_core.layout import Layout
from rlhf_core.report import run_report
from tasks import workspace
from tasks.processes import end_orphans


def run_in_place(root: Path, profile: str, overrides: Sequence[str]) -> str:
    """Run in the checkout `root` itself; the registered version."""
    with workspace.exclusive(root):
        workspace.resolve_params(root, profile, overrides)
        end_orphans(root.resolve(), own_server.APPLICATION)  # of a run here that was killed
        with own_server.starting(apart=False):
            from flows.train import train
    return train(in_place=True)  # which holds the checkout itself


def run_isolated(root: Path, profile: str, overrides: Sequence[str], revision: str) -> tuple[str, Path]:
    """Run in a worktree; the registered version, and where pages and logs are kept."""
    with own_server.starting(apart=True):
        from flows.train import train
        from tasks import worktrees
    state = train(profile=profile or "keep", overrides=list(overrides), revision=revision, return_state=True)
    registered = state.result()
    run_id = worktrees.run_id_of(root, str(state.state_details.flow_run_id))
    return registered, worktrees.kept_dir(root, run_id)


def main() -> None:
    parser = argparse.ArgumentParser(prog="rlhf run", description="Run the whole pipeline.")
    parser.add_argument("--profile", default="")
    parser.add_argument("-S", "--set", dest="overrides", action="append", default=[])
    parser.add_argument("--isolated", action="store_true")
    parser.add_argument("--revision", default="")
    options = parser.parse_args()
    root = shown = Path.cwd()
    with told_in_the_shell():
        # Checked here too, so that a mistake is one line and not a failed flow.
        workspace.check_workspace(root)
        if options.isolated or options.revision:
            registered, shown = run_isolated(root, options.profile, options.overrides, options.revision)
        else:
            registered = run_in_place(root, options.profile, options.overrides)
    from rich.console import Console

    Console().print(run_report(Layout(shown), registered))


if __name__ == "__main__":
    main()
