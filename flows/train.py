"""The flow `train`: data, SFT, reward model, PPO, evaluation, one task a stage; then the registry.

`python -m flows.train` (which `rlhf run` starts) runs it here and now, with no server needed.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

from rlhf_core.cli import QUIET

os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
if "PREFECT_API_URL" not in os.environ:
    # A server of our own for this run, its database beside the workspace's other state.
    home = Path(os.environ.setdefault("PREFECT_HOME", str(Path.cwd() / ".rlhf" / "prefect")))
    home.mkdir(parents=True, exist_ok=True)  # Prefect makes the last directory only
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "ERROR")

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from rlhf_core.config import load_params
from rlhf_core.errors import RLHFError
from rlhf_core.layout import Layout
from rlhf_core.report import run_report
from rlhf_core.stages import STAGES
from tasks import registry, stages, workspace
from tasks.processes import end_orphans

TEMPORARY_SERVER = "prefect.server.api.server:create_app"


def worth_retrying(task_object: Any, run: Any, state: Any) -> bool:
    """A stage that met bad parameters or bad data would only meet them again."""
    error = state.result(raise_on_failure=False)
    return error.retryable if isinstance(error, stages.StageError) else True


class WithoutTraceback(logging.Filter):
    """An expected failure is told by its message; its traceback would only hide it."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], (stages.StageError, RLHFError)):
            record.exc_info = record.exc_text = None
        return True


@task(cache_policy=NO_CACHE, retry_condition_fn=worth_retrying, task_run_name="{stage}", name="stage")
def run_stage(root: Path, stage: str, parent_run_id: str) -> stages.StageResult:
    """Run one stage through DVC. Safe to retry: training goes on from its last checkpoint."""
    return stages.run_stage(root, stage, load_params(Layout(root).params), parent_run_id)


@task(cache_policy=NO_CACHE, name="register")
def register(root: Path, parent: registry.ParentRun) -> str:
    """Put the policy into the registry as the candidate."""
    registry.log_result(root, parent)
    return registry.register_policy(root, load_params(Layout(root).params), parent)


@flow(name="train")
def train(
    profile: Literal["keep", "default", "smoke"] = "keep",
    overrides: list[str] = [],  # noqa: B006 - None would need an Optional, for which the form shows a switcher
    root: str = "",
) -> str:
    """Train and register a policy. Returns the registered version.

    Args:
        profile: keep params.yaml as it is, or apply a profile first.
        overrides: values to change, such as `ppo.kl_coef=0.1`.
        root: the checkout to work in; empty means the one that is deployed.
    """
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(WithoutTraceback())
    directory = Path(root or Path.cwd()).resolve()
    workspace.check_workspace(directory)
    with workspace.exclusive(directory):
        params = workspace.resolve_params(directory, "" if profile == "keep" else profile, overrides)
        with registry.parent_run(directory, params, "train") as parent:
            stages.show_links(directory, parent.uri, parent.run_id, parent.experiment)
            for stage in STAGES:
                run_stage.with_options(retries=params.flow.stage_retries)(directory, stage, parent.run_id)
            return register(directory, parent)


def main() -> None:
    parser = argparse.ArgumentParser(prog="rlhf run", description="Run the whole pipeline.")
    parser.add_argument("--profile", default="")
    parser.add_argument("-S", "--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    root = Path.cwd()
    signal.signal(signal.SIGTERM, _interrupt)  # Prefect passes it on to us when it has noted the crash
    try:
        # Checked here too, so that a mistake is one line and not a failed flow.
        workspace.check_workspace(root)
        with workspace.exclusive(root):
            workspace.resolve_params(root, options.profile, options.overrides)
            end_orphans(root.resolve(), TEMPORARY_SERVER)  # of a run here that was killed
        registered = train(root=str(root))
    except (RLHFError, stages.StageError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    from rich.console import Console

    Console().print(run_report(Layout(root), registered))


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM unwinds like Ctrl-C, so the temporary server is stopped too."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
