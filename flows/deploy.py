"""Make work pool, deployments and automations on the server that PREFECT_API_URL names."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate, WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from flows import automations, collecting, forms, promotions
from flows.settings import HEARTBEAT_SECONDS
from flows.up import POOL
from rlhf_core.config import load_params
from rlhf_core.errors import InputError, RLHFError
from rlhf_core.layout import Layout
from tasks import gpus

CPU_RUNS = 2  # at once; each has a worktree of its own, but they share the processor


def queues() -> dict[str, int]:
    """The queues of the pool, and how many runs each lets through at once: one for each GPU."""
    return {"cpu": CPU_RUNS, "gpu": max(1, len(gpus.visible())), collecting.QUEUE: 1}


def make_pool() -> None:
    """A pool whose worker runs flows as processes, with a queue for runs on GPUs and one for the others."""
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"), overwrite=True)
        for name, limit in queues().items():
            with contextlib.suppress(ObjectAlreadyExists):
                client.create_work_queue(name=name, work_pool_name=POOL)
            queue = client.read_work_queue_by_name(name, work_pool_name=POOL)
            client.update_work_queue(queue.id, concurrency_limit=limit)


def schedules(name: str) -> list[DeploymentScheduleCreate]:
    """Those that people have put on deployment FLOW/NAME; to deploy again without them would delete them."""
    with get_client(sync_client=True) as client:
        try:
            found = client.read_deployment_by_name(name).schedules
        except ObjectNotFound:
            return []
    names = set(DeploymentScheduleCreate.model_fields)
    return [DeploymentScheduleCreate(**schedule.model_dump(include=names)) for schedule in found]


def deploy(root: Path, pool: str = POOL) -> None:
    """The deployment `train/train`, which works in `root`; in another pool `train/train-POOL`.

    Raises InputError for another pool that the server does not have.
    """
    if pool != POOL:
        _check_pool(pool)
    name = "train" if pool == POOL else f"train-{pool}"
    deployment_id = flow.from_source(source=str(root), entrypoint="flows/train.py:train").deploy(
        name=name,
        work_pool_name=pool,
        work_queue_name=("gpu" if gpus.visible() else "cpu") if pool == POOL else None,
        description="Data, SFT, reward model, PPO, evaluation; registers the policy as candidate.",
        tags=["rlhf"],
        job_variables={"env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS)}},
        schedules=schedules(f"train/{name}"),
        ignore_warnings=True,
        build=False,
        push=False,
        print_next_steps=False,
    )
    with get_client(sync_client=True) as client:
        schema = client.read_deployment(deployment_id).parameter_openapi_schema
        schema = forms.for_reader(schema, load_params(Layout(root).params))
        client.update_deployment(deployment_id, DeploymentUpdate(parameter_openapi_schema=schema))


def _check_pool(name: str) -> None:
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(name)
        except ObjectNotFound:
            raise InputError(
                f"--pool {name}: there is no such pool; `prefect work-pool create {name} --type TYPE "
                "--base-job-template configs/work_pools/TYPE.json` makes it"
            ) from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", default=POOL, help="a pool for Docker or Kubernetes that there is already")
    pool = parser.parse_args().pool
    try:
        if pool == POOL:
            make_pool()
        deploy(Path.cwd().resolve(), pool)
        automations.ensure()
        automations.ask_for_life()
        promotions.deploy_all(Path.cwd().resolve())
        collecting.deploy_all(Path.cwd().resolve())
        from flows import retraining  # it reads our schedules

        retraining.deploy_all(Path.cwd().resolve())
    except RLHFError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
