"""The deployments `promote` and `rollback`, and the automation that compares what `train` has registered."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

from prefect import flow
from prefect.automations import Automation
from prefect.events.actions import RunDeployment
from prefect.events.schemas.automations import EventTrigger, Posture

from flows.up import POOL
from tasks import gpus
from tasks.registry import REGISTERED

NAME = "rlhf: compare new candidates"
DEPLOYED = {
    "promote": "Compare a candidate with the champion, wait for a person, move the aliases.",
    "rollback": "Make the champion before the last one the champion again.",
}


def deploy(root: Path, name: str) -> UUID:
    """The deployment NAME/NAME of the flow of that name, which works in `root`."""
    on_gpu = gpus.visible() and name == "promote"
    return flow.from_source(source=str(root), entrypoint=f"flows/{name}.py:{name}").deploy(
        name=name,
        work_pool_name=POOL,
        work_queue_name="gpu" if on_gpu else "cpu",
        description=DEPLOYED[name],
        tags=["rlhf"],
        build=False,
        push=False,
        print_next_steps=False,
    )


def compare_candidates(promote: UUID) -> Automation:
    """Starts the deployment `promote` with the version that the event names."""
    version = {"__prefect_kind": "jinja", "template": "{{ event.payload.version }}"}
    return Automation(
        name=NAME,
        description="A candidate was registered: compare it with the champion, then wait for a person.",
        trigger=EventTrigger(expect={REGISTERED}, posture=Posture.Reactive, threshold=1),
        actions=[RunDeployment(source="selected", deployment_id=promote, parameters={"version": version})],
    )


def deploy_all(root: Path) -> None:
    """Both deployments and the automation, in place of an older one of its name."""
    made = {name: deploy(root, name) for name in DEPLOYED}
    wanted = compare_candidates(made["promote"])
    try:
        found = Automation.read(name=NAME)
    except ValueError:  # there is none
        wanted.create()
        return
    wanted.id = found.id
    wanted.update()
