"""`rlhf`: one command per stage, which dvc.yaml calls, and the commands that people type.

Nothing heavy is imported before a command runs. Flows stand above this package, so `run` and `up` start them
as modules of their own.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from rlhf_core import allocator, collector
from rlhf_core.commands import collecting as collecting_commands
from rlhf_core.commands import promotion as promotion_commands
from rlhf_core.commands import retraining as retraining_commands
from rlhf_core.commands.chat import chat
from rlhf_core.commands.data import app as data_app
from rlhf_core.errors import InputError, LostRankError, RLHFError
from rlhf_core.layout import Layout
from rlhf_core.parent_death import die_with_parent
from rlhf_core.stages import SHARED, STAGES

if TYPE_CHECKING:
    from rlhf_core.config import Params

app = typer.Typer(
    help="Reinforcement learning from human feedback, from text to a registered policy.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data", help="Look at data files before they are used.")
app.command()(chat)

STAGE_HELP = {
    "prepare": "Read the data sources; split, clean and write data/prepared.",
    "base": "Bring the base model into models/base.",
    "validate": "Check the prepared data; stop here when it is not fit to train on.",
    "pretrain": "Train on plain text first (a model from scratch, or pretrain.num_steps > 0).",
    "sft": "Fine-tune on demonstrations.",
    "preferences": "Sample answers, label them, and merge with human pairs.",
    "reward": "Train the reward model on pairs.",
    "ppo": "Optimise the policy against the reward model.",
    "evaluate": "Compare base, SFT and policy on held-out prompts.",
}
# Set before a library is imported; none of these changes a result.
QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GX_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}

BENCHMARKS = {  # modules of benchmarks/
    "generation": "speed",
    "growth": "growth",
    "bounds": "bounds",
    "gpu": "gpu",
    "peers": "peers",
    "serving": "serving",
    "feedback": "load",
    "startup": "startup",
    "run": "default_run",
    "all": "everything",
}
PARENT_DEATH_VARIABLE = "RLHF_DIE_WITH_PARENT"  # the process without which a stage must not go on
INTERRUPTED = 130
FIRST_RANK_SECONDS = 10.0  # the first rank, which prints, most likely meets the same error: let it end first

Overrides = Annotated[
    list[str] | None, typer.Option("-S", "--set", help="section.key=value; may be repeated.")
]
Profile = Annotated[str, typer.Option(help="A profile of configs/profiles to apply first: default or smoke.")]


def _stage_command(stage: str) -> Callable[[], None]:
    def command() -> None:
        if PARENT_DEATH_VARIABLE in os.environ:
            die_with_parent(int(os.environ[PARENT_DEATH_VARIABLE]))
        allocator.keep_freed()
        from rlhf_core.config import load_params
        from rlhf_core.stages.runner import run_stage

        layout = Layout.here()
        params = load_params(layout.params)
        if not _names_hub(params):
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        if stage in SHARED and params.run.num_processes > 1 and "RANK" not in os.environ:
            from rlhf_core.launch import in_processes

            in_processes(stage, params.run, layout)
        run_stage(stage, params, layout)

    command.__name__ = stage
    command.__doc__ = STAGE_HELP[stage]
    return command


def _names_hub(params: Params) -> bool:
    sources = (*params.data.demonstrations, *params.data.preferences, *params.data.prompts)
    return params.model.source == "hub" or any(source.startswith("hub:") for source in sources)


for _stage in STAGES:
    app.command(_stage)(_stage_command(_stage))


@app.command()
def run(
    profile: Profile = "",
    overrides: Overrides = None,
    isolated: Annotated[
        bool, typer.Option("--isolated", help="In a git worktree of its own; several may run at once.")
    ] = False,
    revision: Annotated[
        str, typer.Option(help="The commit, branch or tag to run in a worktree; empty: the last commit.")
    ] = "",
) -> None:
    """Run the whole pipeline as a Prefect flow; no server needs to run. Ends with a table of results."""
    options = ["--profile", profile] if profile else []
    if isolated or revision:
        options += ["--isolated", "--revision", revision]
    for text in overrides or []:
        options += ["-S", text]
    _become("flows.run", options)


@app.command()
def plan(profile: Profile = "", overrides: Overrides = None) -> None:
    """Say which stages a run would compute, why, and about how long; nothing is changed."""
    options = ["--profile", profile] if profile else []
    for text in overrides or []:
        options += ["-S", text]
    _become("tasks.plan", options)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def runs(context: typer.Context) -> None:
    """List runs that have a worktree's branch; `runs compare A B`, `runs reproduce A`."""
    _become("tasks.runs", context.args)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def gc(context: typer.Context) -> None:
    """Free cache, worktrees and checkpoints that nothing needs; lists first, and asks (`--yes` does not)."""
    _become("tasks.gc", context.args)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def remote(context: typer.Context) -> None:
    """Whether the DVC remote has everything, and whole: `remote check --content`, `remote mend`."""
    _become("tasks.remote", context.args)


@app.command()
def up(
    host: Annotated[str, typer.Option(help="Listen there; beyond loopback RLHF_AUTH must be set.")] = "",
) -> None:
    """Start Prefect, a worker, the deployments, MLflow and the pages for annotators on this machine."""
    _become("flows.up", ["--host", host] if host else [])


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def bench(context: typer.Context) -> None:
    """Measure speed in this checkout: generation, growth, gpu, `peers CASE`, serving, startup, run, all."""
    part, *options = context.args or ["--help"]
    if part not in BENCHMARKS:
        raise InputError(
            f"rlhf bench {part}: name one of {', '.join(BENCHMARKS)}, then its options or --help"
        )
    if not Path("benchmarks").is_dir():
        raise InputError("the benchmarks are in the project's checkout; run `rlhf bench` there")
    _become(f"benchmarks.{BENCHMARKS[part]}", options)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def feedback(context: typer.Context) -> None:
    """Collect people's votes: `feedback serve`, create-project, add-annotator, import, export, status."""
    _become("feedback.cli", context.args)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def serve(context: typer.Context) -> None:
    """Answer chats with the champion, in OpenAI's form; a new champion takes over without a restart."""
    _become("serving.cli", context.args)


@app.command()
def doctor() -> None:
    """Look at all that a run needs here, and say what to do about what is missing."""
    _become("tasks.doctor", [])


@app.command()
def params(profile: Profile = "", overrides: Overrides = None) -> None:
    """Check params.yaml; with a profile or -S, change it first (comments are kept)."""
    from rlhf_core.config import change_params, parse_overrides, profile_values

    layout = Layout.here()
    values = profile_values(profile, layout.root) if profile else {}
    change_params(layout.params, values | parse_overrides(overrides or []))
    typer.echo(f"{layout.params}: all values are valid")


@app.command()
def report() -> None:
    """Print the results of the last run again."""
    from rich.console import Console

    from rlhf_core.report import run_report

    Console().print(run_report(Layout.here()))


def _become(module: str, options: list[str]) -> NoReturn:
    """Replace this process, so that signals and the exit status are the flow's own."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *options])


promotion_commands.add_to(app, _become)
collecting_commands.add_to(app, _become)
retraining_commands.add_to(app, _become)


def main() -> None:
    """Run a command; an expected failure ends with one message and a status of its own."""
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    signal.signal(signal.SIGTERM, _on_terminate)
    try:
        app(prog_name="rlhf")
    except LostRankError as error:  # whoever started the processes says which one died
        sys.exit(error.exit_code)
    except RLHFError as error:
        print(f"error: {error}", file=sys.stderr)
        if int(os.environ.get("RANK", "0")) > 0:
            time.sleep(FIRST_RANK_SECONDS)
        sys.exit(error.exit_code)
    except SystemExit as ended:
        if ended.code == INTERRUPTED and "RANK" not in os.environ:  # what Typer makes of a KeyboardInterrupt
            print("\ninterrupted; run the same command again to go on", file=sys.stderr)
        raise
    except OSError as error:
        print(f"error: {_describe(error)}", file=sys.stderr)
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the way out is not to be interrupted by a traceback
        collector.leave_all()


def _on_terminate(signum: int, frame: object) -> NoReturn:
    """SIGTERM unwinds like Ctrl-C, so partial outputs go and the tracker ends its run."""
    raise KeyboardInterrupt


def _describe(error: OSError) -> str:
    where = f"{Path(error.filename)}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


if __name__ == "__main__":
    main()
