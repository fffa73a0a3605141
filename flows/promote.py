"""The flow `promote`: compare a candidate with the champion, wait for a person, move the aliases.

`python -m flows.promote` (which `rlhf promote` starts) compares here and now, with no server needed, and
ends; `rlhf approve` goes on from there. A run of the deployment suspends itself with a form instead: it holds
neither process nor GPU while it waits.
"""
# ruff: noqa: E402 - what Prefect reads is set before it is imported

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Literal

from flows import own_server

own_server.prepare(apart=True)

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.logging import get_run_logger
from prefect.runtime import deployment, flow_run
from prefect.settings import PREFECT_API_URL
from pydantic import Field

from flows import expected
from flows.shell import told_in_the_shell
from rlhf_core.config import Params
from tasks import decisions, gpus, promotion, workspace
from tasks.workspace import read_params

APPROVALS = ("as in params.yaml", "person", "auto")
APPROVAL_KEY = "approval"  # the same when the flow is taken up again, so it finds the answer


class Approval(RunInput):
    """The form in Prefect's UI."""

    decision: Literal["approve", "reject"] = Field(title="Decision")
    name: str = Field(title="Your name", min_length=1)
    reason: str = Field(title="Reason", min_length=1)


@task(cache_policy=NO_CACHE, name="compare")
def compare(root: Path, params: Params, begun: promotion.Promotion) -> promotion.Promotion:
    """Candidate and opponent answer anew; a promotion that has its verdict keeps it."""
    logger = get_run_logger()
    wanted = 0 if params.run.device == "cpu" else 1
    with gpus.held(wanted, logger.info) as names:
        if names:
            os.environ[gpus.VARIABLE] = ",".join(names)
        return promotion.compare(root, params, begun, logger.info)


@task(cache_policy=NO_CACHE, name="decide")
def decide(root: Path, run_id: str, decision: Literal["approve", "reject"], by: str, reason: str) -> str:
    """Move the aliases, unless another decision was first."""
    said = decisions.settle_decision(root, run_id, decision, by, reason)
    get_run_logger().info(said)
    return said


@flow(name="promote")
def promote(
    version: str = "",
    approval: Literal["as in params.yaml", "person", "auto"] = "as in params.yaml",
    overrides: list[str] = [],  # noqa: B006 - None would need an Optional, for which the form shows a switcher
) -> str:
    """Compare a candidate with the champion, and make it the champion. Returns what came of it.

    Args:
        version: the registered version; empty means the one with the alias candidate.
        approval: who says yes once the gate holds.
        overrides: values of params.yaml for this promotion only, such as `promotion.margin=0.05`.
    """
    expected.tell_without_traceback()
    root = Path.cwd().resolve()
    params = read_params(root, overrides)
    origin = {"prefect.flow_run": str(flow_run.id)}
    if own_server.is_lasting():
        origin |= {"prefect.url": str(flow_run.ui_url), "prefect.api": str(PREFECT_API_URL.value())}
    found = compare(root, params, promotion.open_promotion(root, params, version, origin))
    text = promotion.scorecard_text(root, found.run_id)
    if found.state in (promotion.FAILED, promotion.PENDING):
        create_markdown_artifact(text, key="scorecard", description=found.title)
    if found.state == promotion.FAILED:
        return f"{found.title}: the gate does not hold: {found.tags['gate.reasons']}"
    who = params.promotion.approval if approval == "as in params.yaml" else approval
    if found.state == promotion.PENDING and who == decisions.AUTO:
        if found.outcome == "pass":
            return decide(root, found.run_id, "approve", decisions.AUTO, "the gate holds")
        get_run_logger().warning("approval is auto, but the verdict is '%s': a person decides", found.outcome)
    if found.state != promotion.PENDING:  # decided from a shell while this run was suspended
        return f"{found.title}: {found.state}, by {found.tags.get('promotion.by', 'another decision')}"
    if not deployment.id:
        return f"{found.title}: {found.outcome}; waits as promotion {found.short_id}"
    form = Approval.with_initial_data(description=text)
    answer = suspend_flow_run(wait_for_input=form, timeout=None, key=APPROVAL_KEY)
    return decide(root, found.run_id, answer.decision, answer.name, answer.reason)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="rlhf promote", description="Compare a candidate with the champion."
    )
    parser.add_argument("--version", default="")
    parser.add_argument("--approval", default=APPROVALS[0], choices=APPROVALS)
    parser.add_argument("-S", "--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    root = Path.cwd().resolve()
    with told_in_the_shell("nothing was promoted"):
        workspace.check_workspace(root)
        params = read_params(root, options.overrides)  # so that a mistake is one line and not a failed flow
        state = promote(options.version, options.approval, options.overrides, return_state=True)
        said = state.result()
        _show(root, params, str(state.state_details.flow_run_id), said)


def _show(root: Path, params: Params, flow_run_id: str, said: str) -> None:
    """The scorecard, its page, and what to do next; ends with status 3 when the gate does not hold."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    name = params.flow.registered_model
    found = promotion.begun_by(root, name, flow_run_id)
    assert found is not None
    console.print(Markdown(promotion.scorecard_text(root, found.run_id)))
    console.print(f"\nscorecard  {promotion.scorecard_place(root, found.run_id)}", soft_wrap=True)
    console.print(said, markup=False, highlight=False)
    if found.state == promotion.PENDING:
        console.print(f"decide:    rlhf approve {found.short_id} --name YOU --reason WHY   (or --reject)")
    if found.state == promotion.FAILED:
        sys.exit(3)


if __name__ == "__main__":
    main()
