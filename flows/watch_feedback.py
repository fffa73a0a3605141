"""The flow `watch_feedback`: one look at the collections of feedback that are open.

Its deployment has a schedule that is on only while there is one, so waiting for people costs a short run now
and then and holds no process. What it has to know stands in the annotation service's log and on Prefect's
server, so it goes through restarts of everything.
"""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

from prefect import flow
from prefect.logging import get_run_logger
from prefect.runtime import deployment

from flows import expected
from tasks import watching


@flow(name=watching.WATCH)
def watch_feedback() -> str:
    """Show how far each open collection is, and tell of those that ended. Returns whether any is left."""
    expected.tell_without_traceback()
    root = Path.cwd().resolve()
    if deployment.id:
        watching.skip_missed(UUID(deployment.id))
    if watching.look(root, get_run_logger().info):
        return "votes are waited for"
    return "nothing is waited for" if watching.rest(root) else "votes are waited for"
