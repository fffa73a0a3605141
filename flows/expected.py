"""How flows tell of failures that are expected."""

from __future__ import annotations

import logging

from rlhf_core.errors import RLHFError


class WithoutTraceback(logging.Filter):
    """An expected failure is told by its message; its traceback would only hide it."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], RLHFError):
            record.exc_info = record.exc_text = None
        return True


def tell_without_traceback() -> None:
    """From now on, in this process, for what Prefect logs of flows and tasks."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(name)
        if not any(isinstance(one, WithoutTraceback) for one in logger.filters):
            logger.addFilter(WithoutTraceback())
