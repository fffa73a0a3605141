"""Make work pool, deployments and automations on the server that PREFECT_API_URL names."""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate

from flows import automations
from flows.up import POOL


def make_pool() -> None:
    """A pool whose worker runs flows as processes, one at a time, since they share a checkout."""
    with get_client(sync_client=True) as client:
        client.create_work_pool(
            WorkPoolCreate(name=POOL, type="process", concurrency_limit=1), overwrite=True
        )


def deploy(root: Path) -> None:
    """The deployment `train/train`, which works in `root`."""
    flow.from_source(source=str(root), entrypoint="flows/train.py:train").deploy(
        name="train",
        work_pool_name=POOL,
        concurrency_limit=1,
        description="Data, SFT, reward model, PPO, evaluation; registers the policy as candidate.",
        tags=["rlhf"],
        build=False,
        push=False,
        print_next_steps=False,
    )


if __name__ == "__main__":
    make_pool()
    deploy(Path.cwd().resolve())
    automations.ensure()
