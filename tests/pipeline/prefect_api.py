"""Servers as a test sees them: through their addresses alone; Prefect's through the API of its pages."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from typing import Any

from .checkouts import wait_for

ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def page(url: str) -> str | None:
    """What a browser gets; None where nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.read().decode()
    except OSError:
        return None


def post(url: str, body: Any) -> Any:
    """As Prefect's own client does, try again while the server's database is busy."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for _ in range(10):
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise
            time.sleep(1.0)
    raise AssertionError(f"{url}: busy for 10 s")


class PrefectApi:
    """`url` is the server's, without /api."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/api"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self._url}/{path}", timeout=30) as reply:
            return json.load(reply)

    def post(self, path: str, body: Any = None) -> Any:
        return post(f"{self._url}/{path}", body or {})

    def deployment(self, name: str) -> dict[str, Any]:
        (found,) = (d for d in self.post("deployments/filter") if d["name"] == name)
        return found

    def start(self, deployment: str, **parameters: Any) -> str:
        """The id of a new run of the deployment, with what somebody typed into its form."""
        path = f"deployments/{self.deployment(deployment)['id']}/create_flow_run"
        return self.post(path, {"parameters": parameters})["id"]

    def state(self, run: str) -> str:
        return self.get(f"flow_runs/{run}")["state_type"]

    def follow(self, run: str, seconds: float = 900) -> str:
        """The state in which the run ends; what it logged when that is not COMPLETED shows in the test."""
        wait_for(lambda: self.state(run) in ENDED, seconds)
        if self.state(run) != "COMPLETED":
            print("\n".join(self.logs(run)[-60:]))
        return self.state(run)

    def cancel(self, run: str) -> None:
        """What the Cancel button of the run's page does."""
        self.post(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})

    def retry(self, run: str) -> None:
        """What the Retry button of the run's page does."""
        state = {"type": "SCHEDULED", "name": "AwaitingRetry"}
        self.post(f"flow_runs/{run}/set_state", {"state": state, "force": True})

    def artifacts(self, run: str) -> dict[str, Any]:
        """The data of the run's artifacts by key."""
        found = self.post("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}, "limit": 200})
        return {artifact["key"]: artifact["data"] for artifact in found}

    def tasks(self, run: str) -> list[str]:
        """The names of the run's tasks that completed, in the order in which they started."""
        wanted = {"flow_runs": {"id": {"any_": [run]}}, "sort": "EXPECTED_START_TIME_ASC"}
        found = self.post("task_runs/filter", wanted)
        return [task["name"] for task in found if task["state_type"] == "COMPLETED"]

    def logs(self, run: str) -> list[str]:
        wanted = {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
        lines: list[str] = []
        while page := self.post("logs/filter", wanted | {"offset": len(lines)}):
            lines += [line["message"] for line in page]
        return lines
