"""The flow `train`: data, SFT, reward model, PPO, evaluation, one task a stage; then the registry.

`flows/run.py` runs it here and now, for `rlhf run`.
"""
# ruff: noqa: E402 - what Prefect reads is set before it is imported

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from flows import own_server

own_server.prepare(apart=False)

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import flow_run, task_run

from flows import expected, forms
from rlhf_core.config import Params, load_params
from rlhf_core.layout import Layout
from rlhf_core.rollout_engines.server import check_program
from rlhf_core.stages import STAGES
from tasks import gpus, registry, shown, stages, workspace, worktrees
from tasks.plan import Planned, plan, rows, summary, wished_params

RETRY_SECONDS = 10  # before a failed task is started again: memory is free by then, a server up again


def worth_retrying(task_object: Any, run: Any, state: Any) -> bool:
    """A stage that met bad parameters or bad data would only meet them again."""
    error = state.result(raise_on_failure=False)
    return error.retryable if isinstance(error, stages.StageError) else True


@task(cache_policy=NO_CACHE, retry_condition_fn=worth_retrying, task_run_name="{stage}", name="stage")
def run_stage(
    root: Path, stage: str, parent: registry.ParentRun, kept: Path | None = None
) -> stages.StageResult:
    """Run one stage through DVC. Safe to retry: training goes on from its last checkpoint."""
    again = max(flow_run.run_count or 0, task_run.run_count or 0) > 1
    return stages.run_stage(root, stage, load_params(Layout(root).params), parent, kept, again)


@task(cache_policy=NO_CACHE, name="register", retries=2, retry_delay_seconds=RETRY_SECONDS)
def register(root: Path, parent: registry.ParentRun) -> str:
    """Put the policy into the registry as the candidate."""
    registry.log_result(root, parent)
    return registry.register_policy(root, load_params(Layout(root).params), parent)


@task(cache_policy=NO_CACHE, name="push", retries=3, retry_delay_seconds=[10, 60, 300])
def push(place: worktrees.RunPlace) -> None:
    """Send the run's data and models to the DVC remote, where there is one."""
    if not worktrees.push(place):
        get_run_logger().warning(
            "no DVC remote is set; data and models are in the cache of this machine only"
        )


@flow(name="train")
def train(
    profile: Literal["keep", "default", "smoke"] = "keep",
    run: forms.RunForm = forms.RunForm(),
    model: forms.ModelForm = forms.ModelForm(),
    data: forms.DataForm = forms.DataForm(),
    sft: forms.SFTForm = forms.SFTForm(),
    preferences: forms.PreferencesForm = forms.PreferencesForm(),
    reward: forms.RewardForm = forms.RewardForm(),
    ppo: forms.PPOForm = forms.PPOForm(),
    evaluate: forms.EvaluateForm = forms.EvaluateForm(),
    overrides: list[str] = [],  # noqa: B006 - None would need an Optional, for which the form shows a switcher
    revision: str = "",
    in_place: bool = False,
    dry_run: bool = False,
) -> str:
    """Train and register a policy. Returns the registered version, or what a dry run found.

    Args:
        profile: keep params.yaml as it is, or apply a profile first.
        run: the run as a whole. Empty fields mean what params.yaml or the profile says, here and below.
        model: the model that everything starts from.
        data: where the text comes from.
        sft: supervised fine-tuning.
        preferences: answers of the SFT model and their labels.
        reward: the reward model.
        ppo: the policy against the reward model.
        evaluate: the comparison of base, SFT and policy.
        overrides: any other value, such as `ppo.gae_lambda=0.9`; holds where a field above says otherwise.
        revision: the branch, tag or commit to run; empty means the last commit, with params.yaml as it lies
            in the checkout.
        in_place: work in the checkout itself, one run at a time, rather than in a worktree of its own.
        dry_run: only say which stages would run in the checkout, why, and about how long.
    """
    expected.tell_without_traceback()
    home = Path.cwd().resolve()
    workspace.check_workspace(home)
    groups = (run, model, data, sft, preferences, reward, ppo, evaluate)
    overrides = [*forms.overrides_of(dict(zip(forms.GROUPS, groups, strict=True))), *overrides]
    profile_name = "" if profile == "keep" else profile
    if dry_run:
        return show_plan(plan(home, profile_name, overrides))
    if in_place or not workspace.has_git(home):
        with workspace.exclusive(home):
            return run_stages(home, workspace.resolve_params(home, profile_name, overrides))
    if not revision and (flow_run.run_count or 0) <= 1:
        wished_params(Layout(home), profile_name, overrides)  # so that a mistake leaves no worktree behind
    run_id = worktrees.run_id_of(home, str(flow_run.id))
    with worktrees.run_place(home, run_id, revision) as place:
        params = workspace.resolve_params(place.root, profile_name, overrides)
        worktrees.bring_data(place, params)
        with gpus_for(params):
            registered = run_stages(place.root, params, place)
    push(place)
    worktrees.remove(place)
    return registered


def show_plan(planned: list[Planned]) -> str:
    """The plan as an artifact and a line of the log."""
    said = summary(planned)
    create_table_artifact(rows(planned), key="plan", description=said)
    get_run_logger().info(said)
    return said


@contextlib.contextmanager
def gpus_for(params: Params) -> Iterator[None]:
    """As many GPUs as the run has processes, its own while it trains; other runs wait, or take others."""
    wanted = 0 if params.run.device == "cpu" else params.run.num_processes
    with gpus.held(wanted, get_run_logger().info) as names:
        if names:
            os.environ[gpus.VARIABLE] = ",".join(names)
        yield


def run_stages(
    root: Path,
    params: Params,
    place: worktrees.RunPlace | None = None,
    more: Mapping[str, str] | None = None,
    begun: Callable[[registry.ParentRun], None] = lambda parent: None,
) -> str:
    """All stages in the workspace `root`, then the registry. Returns the registered version.

    `more` become tags of run and version beside those that say what started it; `begun` gets the MLflow run.
    """
    check_program(params.ppo)  # before the stages that come before it
    name = place.branch if place else "train"
    origin = {"prefect.flow_run": str(flow_run.id)}
    if own_server.is_lasting():
        origin["prefect.url"] = str(flow_run.ui_url)
    if place:
        origin |= {"rlhf.branch": place.branch}
    origin |= more or {}
    with registry.parent_run(root, params, name, origin) as parent:
        shown.link_runs(root, parent)
        begun(parent)
        if place:
            worktrees.note(place, mlflow_run=parent.run_id)
        for stage in STAGES:
            retried = run_stage.with_options(
                retries=params.flow.stage_retries, retry_delay_seconds=RETRY_SECONDS
            )
            retried(root, stage, parent, place.kept if place else None)
        if place:  # first, so that what is registered names the commit with its parameters and dvc.lock
            worktrees.record(place, f"Run {place.run_id}")
        return register(root, parent)
