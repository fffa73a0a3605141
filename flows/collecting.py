"""The deployments `collect_feedback` and `watch_feedback`, and the schedule of the second.

The schedule is on while a collection is open: whoever opens one switches it on, the look that finds none left
switches it off, and to make the deployments again sets it right.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.schedules import Interval

from flows.up import POOL
from rlhf_core.config import Params, load_params
from rlhf_core.layout import Layout
from tasks import gpus
from tasks.watching import WATCH, any_left

COLLECT = "collect_feedback"
QUEUE = "watch"  # of its own: a look takes seconds, and must not wait for a training to end


def deploy_all(root: Path) -> None:
    """Both deployments, which work in `root`."""
    params = load_params(Layout(root).params)
    _deploy(
        root,
        COLLECT,
        "Two policies answer prompts; the answers are put before people.",
        work_queue_name="gpu" if gpus.visible() else "cpu",
    )
    _deploy(
        root,
        WATCH,
        "One look at the votes of open collections; its schedule is on only while there are any.",
        work_queue_name=QUEUE,
        schedules=[schedule(params, any_left(root))],
        # One look at a time; those that fell due while the worker was away are skipped by the first.
        concurrency_limit=ConcurrencyLimitConfig(
            limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW
        ),
    )


def schedule(params: Params, active: bool) -> Any:
    every = timedelta(seconds=params.collect.watch_seconds)
    return Interval(every, active=active, slug=WATCH)


def _deploy(root: Path, name: str, description: str, **options: Any) -> None:
    flow.from_source(source=str(root), entrypoint=f"flows/{name}.py:{name}").deploy(
        name=name,
        work_pool_name=POOL,
        description=description,
        tags=["rlhf"],
        ignore_warnings=True,
        build=False,
        push=False,
        print_next_steps=False,
        **options,
    )
