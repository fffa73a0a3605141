"""The deployment `retrain`, one run at a time, and the automation that a finished collection starts it by."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

from prefect import flow
from prefect.automations import Automation
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.events.actions import RunDeployment
from prefect.events.schemas.automations import EventTrigger, Posture

from flows.deploy import schedules
from flows.settings import HEARTBEAT_SECONDS
from flows.up import POOL
from tasks import gpus
from tasks.events import FEEDBACK_READY

NAME = "rlhf: train on new votes"


def deploy(root: Path) -> UUID:
    """The deployment retrain/retrain, with the schedules that people have given it.

    A run that comes while another one goes on waits for it. GPUs are taken when they are needed.
    """
    return flow.from_source(source=str(root), entrypoint="flows/retrain.py:retrain").deploy(
        name="retrain",
        work_pool_name=POOL,
        work_queue_name="gpu" if gpus.visible() else "cpu",
        description="Trains on people's votes when there are enough new ones; registers a candidate.",
        tags=["rlhf"],
        job_variables={"env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS)}},
        schedules=schedules("retrain/retrain"),
        concurrency_limit=ConcurrencyLimitConfig(
            limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE
        ),
        ignore_warnings=True,
        build=False,
        push=False,
        print_next_steps=False,
    )


def train_on_new_votes(retrain: UUID) -> Automation:
    """Starts the deployment `retrain` when a collection has its votes, or its deadline is over."""
    return Automation(
        name=NAME,
        description="A collection of feedback is done: train on it, where there are enough new votes.",
        trigger=EventTrigger(expect={FEEDBACK_READY}, posture=Posture.Reactive, threshold=1),
        actions=[RunDeployment(source="selected", deployment_id=retrain)],
    )


def deploy_all(root: Path) -> None:
    """Deployment and automation, in place of an older one of its name."""
    wanted = train_on_new_votes(deploy(root))
    try:
        found = Automation.read(name=NAME)
    except ValueError:  # there is none
        wanted.create()
        return
    wanted.id = found.id
    wanted.update()
