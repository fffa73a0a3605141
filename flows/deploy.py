"""Make work pool, deployments and automations on the server that PREFECT_API_URL names."""

from __future__ import annotations

import contextlib
from pathlib import Path
from uuid import UUID

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists

from flows import automations
from flows.up import POOL
from tasks import gpus

CPU_RUNS = 2  # at once; each has a worktree of its own, but they share the processor


def queues() -> dict[str, int]:
    """The queues of the pool, and how many runs each lets through at once: one for each GPU."""
    return {"cpu": CPU_RUNS, "gpu": max(1, len(gpus.visible()))}


def make_pool() -> None:
    """A pool whose worker runs flows as processes, with a queue for runs on GPUs and one for the others."""
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"), overwrite=True)
        for name, limit in queues().items():
            with contextlib.suppress(ObjectAlreadyExists):
                client.create_work_queue(name=name, work_pool_name=POOL)
            queue = client.read_work_queue_by_name(name, work_pool_name=POOL)
            client.update_work_queue(queue.id, concurrency_limit=limit)


DEPLOYED = {
    "train": "Data, SFT, reward model, PPO, evaluation; registers the policy as candidate.",
    "promote": "Compare a candidate with the champion, wait for a person, move the aliases.",
    "rollback": "Make the champion before the last one the champion again.",
}


def deploy(root: Path, name: str) -> UUID:
    """The deployment NAME/NAME of the flow of that name, which works in `root`."""
    on_gpu = gpus.visible() and name != "rollback"
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


if __name__ == "__main__":
    make_pool()
    made = {name: deploy(Path.cwd().resolve(), name) for name in DEPLOYED}
    automations.ensure(automations.crash_silent_runs())
    automations.ensure(automations.compare_candidates(made["promote"]))
