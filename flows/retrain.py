"""The flow `retrain`: new votes become a data set, and that a candidate for the gate.

`python -m flows.retrain` (which `rlhf retrain` starts) does it here and now, with no server needed. The
deployment runs on a schedule, and when a collection says that it has its votes.
"""
# ruff: noqa: E402 - what Prefect reads is set before it is imported

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from flows import own_server

own_server.prepare(apart=True)

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import deployment, flow_run
from prefect.states import Completed, State
from prefect.utilities.annotations import quote

from feedback.dataset import CARD
from feedback.history import Votes
from flows import expected, slots
from flows.shell import told_in_the_shell
from flows.train import gpus_for, push, run_stages
from rlhf_core.config import (
    Params,
    change_params,
    parse_overrides,
    parse_params,
    profile_values,
    put,
    read_yaml,
)
from rlhf_core.errors import InputError
from rlhf_core.layout import Layout
from rlhf_core.mlflow_writer import open_client
from rlhf_core.report import run_report
from tasks import ai_agreement, retraining, workspace, worktrees
from tasks.registry import ParentRun
from tasks.schedule import covered_by

RETRIES, RETRY_SECONDS = 3, 10  # a store that people vote in, or the registry, may be busy


def read_params(home: Path, profile: str, overrides: Sequence[str]) -> Params:
    """params.yaml with profile and overrides; nothing is written. Raises InputError."""
    path = Layout(home).params
    tree = read_yaml(path)
    put(tree, (profile_values(profile, home) if profile else {}) | parse_overrides(overrides))
    return parse_params(tree, f"{path} with {', '.join(overrides)}" if overrides else str(path))


def worth_retrying(task_object: Any, run: Any, state: Any) -> bool:
    """What was wrong with votes or parameters would be wrong again."""
    return not isinstance(state.result(raise_on_failure=False), InputError)


@task(
    cache_policy=NO_CACHE,
    name="gather votes",
    retries=RETRIES,
    retry_delay_seconds=RETRY_SECONDS,
    retry_condition_fn=worth_retrying,
)
def gather_votes(home: Path, params: Params) -> Votes:
    """Everything people said up to now, and what of it is new since the last retraining."""
    return retraining.read_votes(home, params)


@task(cache_policy=NO_CACHE, name="make data set")
def make_dataset(place: worktrees.RunPlace, params: Params, votes: Votes) -> dict[str, Any]:
    """The data set in the run's worktree, under DVC; one that is there from an earlier try stays."""
    manifest = retraining.dataset_in(place.root)
    if manifest is None:
        retraining.write_dataset(place, retraining.build(place.root, params, votes))
        manifest = retraining.dataset_in(place.root)
        assert manifest is not None
    card = place.root / retraining.FEEDBACK / manifest["version"] / CARD
    create_markdown_artifact(card.read_text(encoding="utf-8"), key="feedback", description="The data set")
    return manifest


@task(cache_policy=NO_CACHE, name="compare AI and people")
def compare_labels(root: Path, params: Params, votes: Votes) -> list[ai_agreement.Measured]:
    """How far the AI labeler agrees with people, as an artifact."""
    found = ai_agreement.measure(root, params, votes, get_run_logger().info)
    if found:
        rows = [one.row() for one in found]
        create_table_artifact(rows, key="ai-agreement", description="The AI labeler against people")
    return found


@task(cache_policy=NO_CACHE, name="bring champion", retries=RETRIES, retry_delay_seconds=RETRY_SECONDS)
def bring_champion(home: Path, place: worktrees.RunPlace, params: Params) -> retraining.Champion | None:
    """The champion's weights, where `retrain.start` asks for them and there is a champion."""
    if params.retrain.start == "sft":
        return None
    champion = retraining.find_champion(home, params)
    if champion is None:
        get_run_logger().warning("retrain.start is champion, and there is none yet: PPO starts from SFT")
        return None
    retraining.bring_champion(place, champion)
    return champion


@task(cache_policy=NO_CACHE, name="mark votes as used", retries=RETRIES, retry_delay_seconds=RETRY_SECONDS)
def mark_used(home: Path, params: Params, registered: str, manifest: dict[str, Any]) -> None:
    """The last step: from now on these votes are not new."""
    retraining.mark_used(home, params, registered, manifest)


@flow(name="retrain")
def retrain(
    profile: Literal["keep", "default", "smoke"] = "keep",
    overrides: list[str] = [],  # noqa: B006 - None would need an Optional, for which the form shows a switcher
    force: bool = False,
) -> str | State[Any]:
    """Train on people's votes, old and new, and register a candidate. Returns what came of it.

    Args:
        profile: keep params.yaml as it is, or apply a profile first.
        overrides: values of params.yaml for this retraining only, such as `retrain.start=champion`.
        force: train also with fewer new votes than retrain.min_votes.
    """
    expected.tell_without_traceback()
    home = Path.cwd().resolve()
    workspace.check_workspace(home)
    name = "" if profile == "keep" else profile
    params = read_params(home, name, overrides)
    logger = get_run_logger()
    with retraining.one_at_a_time(home, wait=bool(deployment.id), say=logger.info):
        if (other := covered_by(*slots.seen())) is not None:
            said = _nothing(f"this slot was missed, and run {other.run} has done its work: nothing to do")
            return Completed(name=slots.SKIPPED_NAME, message=said)
        votes = None
        if params.retrain.labels != "ai":
            votes = gather_votes(home, params)
            if not force and (reason := retraining.too_few(votes, params)):
                return _nothing(reason)
        return _train(home, name, overrides, votes)


def _nothing(reason: str) -> str:
    """An end that is well: it is said where people look, and the run is Completed."""
    get_run_logger().info(reason)
    create_markdown_artifact(reason, key="retrain", description="Why nothing was trained")
    return reason


def _train(home: Path, profile: str, overrides: Sequence[str], votes: Votes | None) -> str:
    """The run in its worktree, from data set to candidate."""
    run_id = worktrees.run_id_of(home, str(flow_run.id))
    manifest = None
    with worktrees.run_place(home, run_id, "") as place:
        params = workspace.resolve_params(place.root, profile, overrides)
        worktrees.bring_data(place, params)
        measured: list[ai_agreement.Measured] = []
        if votes is not None:
            if params.retrain.labels == "mixed":
                measured = compare_labels(place.root, params, quote(votes))
            manifest = make_dataset(place, params, quote(votes))
        champion = bring_champion(home, place, params)
        more = retraining.lineage(params, place.root, manifest, champion)
        values = retraining.values_for(params, place.root, manifest, champion)
        params = change_params(Layout(place.root).params, values)
        with gpus_for(params):
            registered = run_stages(
                place.root, params, place, more, lambda run: log_agreement(home, run, measured)
            )
    push(place)
    if manifest is not None:
        mark_used(home, params, registered, manifest)
    worktrees.remove(place)
    return registered


def log_agreement(home: Path, parent: ParentRun, measured: Sequence[ai_agreement.Measured]) -> None:
    """Into the run in MLflow, beside everything else that it measured."""
    client = open_client(home)
    for one in measured:
        for name, value in one.metrics().items():
            client.log_metric(parent.run_id, name, value)


def main() -> None:
    parser = argparse.ArgumentParser(prog="rlhf retrain", description="Train again on people's votes.")
    parser.add_argument("--profile", default="")
    parser.add_argument("-S", "--set", dest="overrides", action="append", default=[])
    parser.add_argument("--force", action="store_true")
    options = parser.parse_args()
    home = Path.cwd().resolve()
    with told_in_the_shell("run the same command again: what was computed is taken over"):
        workspace.check_workspace(home)
        read_params(home, options.profile, options.overrides)  # a mistake is one line and not a failed flow
        state = retrain(options.profile or "keep", options.overrides, options.force, return_state=True)
        said = state.result()
        _show(home, str(state.state_details.flow_run_id), said)


def _show(home: Path, flow_run_id: str, said: str) -> None:
    from rich.console import Console

    console = Console()
    if said.startswith("models:/"):
        kept = worktrees.kept_dir(home, worktrees.run_id_of(home, flow_run_id))
        console.print(run_report(Layout(kept), said))
        said = f"registered {said}; `rlhf promote` compares it with the champion"
    console.print(said, markup=False, highlight=False)


if __name__ == "__main__":
    main()
