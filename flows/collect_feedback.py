"""The flow `collect_feedback`: two policies answer prompts, and the answers are put before people.

It ends when the queue is filled. Waiting for the votes is `watch_feedback`'s, which looks from time to time
while a collection is open; no process waits.

`python -m flows.collect_feedback` (which `rlhf collect` starts) runs it here and now.
"""
# ruff: noqa: E402 - what Prefect reads is set before it is imported

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Literal

from flows import own_server

own_server.prepare(apart=True)

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from feedback.watching import find_collection, settle
from flows import expected
from flows.shell import told_in_the_shell
from rlhf_core.config import Params
from tasks import collecting, gpus, watching, workspace
from tasks.asking import open_store

CHOICES = ("keep", "random", "uncertain", "disagreement", "production")


@task(cache_policy=NO_CACHE, name="ask")
def ask(root: Path, params: Params) -> str:
    """Answers and a filled queue, or the collection that asks the same and is open. Safe to retry."""
    logger = get_run_logger()
    wanted = 0 if params.run.device == "cpu" else 1
    with gpus.held(wanted, logger.info) as names:
        if names:
            os.environ[gpus.VARIABLE] = ",".join(names)
        return collecting.collect(root, params, logger.info)


@task(cache_policy=NO_CACHE, name="show", retries=2, retry_delay_seconds=10)
def show(root: Path, collection: str) -> None:
    """Show it as an artifact, and have it watched from now on."""
    logger = get_run_logger()
    with open_store(root) as store:
        watching.look_at(store, settle(store, collection), logger.info)
    if not watching.keep_watching(True):
        logger.warning("no deployment watch_feedback here: votes are counted once `rlhf up` has made it")


@flow(name="collect_feedback")
def collect_feedback(
    size: int = 0,
    choose: Literal["keep", "random", "uncertain", "disagreement", "production"] = "keep",
    overrides: list[str] = [],  # noqa: B006 - None would need an Optional, for which the form shows a switcher
) -> str:
    """Put answers of two policies before people. Returns the id of the feedback project.

    Args:
        size: prompts to ask; 0 means as in params.yaml.
        choose: which prompts; keep means as in params.yaml.
        overrides: values of params.yaml for this collection only, such as `collect.votes_wanted=50`.
    """
    expected.tell_without_traceback()
    root = Path.cwd().resolve()
    collection = ask(root, workspace.read_params(root, [*typed(size, choose), *overrides]))
    show(root, collection)
    return collection


def typed(size: int, choose: str) -> list[str]:
    """What the fields say, as overrides; those that are given as overrides hold over them."""
    found = [f"collect.num_prompts={size}"] if size else []
    return found + ([f"collect.choose={choose}"] if choose != "keep" else [])


def main() -> None:
    parser = argparse.ArgumentParser(prog="rlhf collect", description="Put answers before people.")
    parser.add_argument("--size", type=int, default=0)
    parser.add_argument("--choose", default=CHOICES[0], choices=CHOICES)
    parser.add_argument("-S", "--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    root = Path.cwd().resolve()
    with told_in_the_shell():
        workspace.check_workspace(root)
        # So that a mistake is one line and not a failed flow.
        workspace.read_params(root, [*typed(options.size, options.choose), *options.overrides])
        collection = collect_feedback(options.size, options.choose, options.overrides)
        with open_store(root) as store:
            found = find_collection(store, collection)
    until = f" until {watching.moment(found.deadline)}" if found.deadline else ""
    print(f"{collection}: waits for {found.wanted} votes{until}; `rlhf collections` lists how far it is")


if __name__ == "__main__":
    main()
