"""The flow `rollback`: make the champion before the last one the champion again."""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from prefect.logging import get_run_logger

from rlhf_core.config import load_params
from rlhf_core.layout import Layout
from tasks import decisions


@flow(name="rollback")
def rollback(name: str, reason: str) -> str:
    """Move the aliases back by one promotion. Returns what came of it.

    Args:
        name: who asks for it.
        reason: why.
    """
    root = Path.cwd().resolve()
    registered = load_params(Layout(root).params).flow.registered_model
    said = decisions.roll_back(root, registered, name, reason)
    get_run_logger().info(said)
    return said
