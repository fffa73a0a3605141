"""`make up`: Prefect's server, a process work pool with a worker, the deployments, MLflow's server and the
annotation service.

All on loopback, on the workspace's own databases, until Ctrl-C. Nothing is left running after.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

from rlhf_core.cli import QUIET, die_with_parent
from rlhf_core.errors import RLHFError
from rlhf_core.layout import Layout
from tasks.network import HOST, answers, free_port
from tasks.processes import end_tree
from tasks.workspace import check_workspace

POOL = "rlhf-process"
START_SECONDS = 120.0
MOST_RESTARTS = 3
HEARTBEAT_SECONDS = 30  # between two signs of life of a run; the least that Prefect sends


class Services:
    """The processes that were started, ended in the opposite order."""

    def __init__(self, root: Path, env: Mapping[str, str]) -> None:
        self._root, self._env = root, dict(env)
        self._logs = Layout(root).state / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._commands: dict[str, tuple[str, ...]] = {}
        self.running: dict[str, subprocess.Popen] = {}

    def start(self, name: str, *command: str) -> None:
        """Start a service; its output goes to .rlhf/logs/NAME.log."""
        again = name in self._commands
        self._commands[name] = command
        with self.log(name).open("ab" if again else "wb") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=self._root,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def wait_until(self, name: str, ready: Callable[[], bool]) -> None:
        """Raises RLHFError when the service dies or is not ready in time."""
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if self.running[name].poll() is not None:
                raise RLHFError(f"{name} ended while starting; see {self.log(name)}")
            if time.monotonic() > deadline:
                raise RLHFError(f"{name} was not ready after {START_SECONDS:.0f} s; see {self.log(name)}")
            time.sleep(0.3)

    def watch(self) -> None:
        """Start a service again that died, at most `MOST_RESTARTS` times each.

        Returns only by an exception: Ctrl-C, or RLHFError when a service dies once more.
        """
        restarts: Counter[str] = Counter()
        while True:
            for name, process in list(self.running.items()):
                if process.poll() is None:
                    continue
                status = process.returncode
                if restarts[name] == MOST_RESTARTS:
                    raise RLHFError(f"{name} ended with status {status} again; see {self.log(name)}")
                restarts[name] += 1
                print(f"{name} ended with status {status}; starting it again", flush=True)
                end_tree(process)  # what it had started
                self.start(name, *self._commands[name])
            time.sleep(1.0)

    def stop(self) -> None:
        for process in reversed(self.running.values()):
            end_tree(process)


def environment(root: Path, prefect_port: int, mlflow_port: int) -> dict[str, str]:
    bin_dir = str(Path(sys.executable).parent)
    return {
        **QUIET,
        **os.environ,
        "PATH": f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}",
        "PREFECT_HOME": str(Layout(root).state / "prefect-server"),
        "PREFECT_API_URL": f"http://{HOST}:{prefect_port}/api",
        "PREFECT_UI_API_URL": f"http://{HOST}:{prefect_port}/api",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        "MLFLOW_TRACKING_URI": f"http://{HOST}:{mlflow_port}",
    }


def start_all(
    services: Services, root: Path, prefect_port: int, mlflow_port: int, feedback_port: int
) -> None:
    """Servers first, then pool and deployment, then the worker that needs both."""
    store, artifacts = f"sqlite:///{root}/mlflow.db", f"file://{root}/mlartifacts"
    services.start("prefect", "prefect", "server", "start", "--host", HOST, "--port", str(prefect_port))
    services.start(
        "mlflow",
        *("mlflow", "server", "--host", HOST, "--port", str(mlflow_port), "--workers", "1"),
        *("--backend-store-uri", store, "--default-artifact-root", artifacts, "--no-serve-artifacts"),
    )
    services.start("feedback", "feedback.cli", "serve", "--host", HOST, "--port", str(feedback_port))
    services.wait_until("prefect", lambda: answers(f"http://{HOST}:{prefect_port}/api/health"))
    services.start("deploy", "flows.deploy")
    services.running["deploy"].wait(timeout=START_SECONDS)
    if services.running.pop("deploy").returncode != 0:
        raise RLHFError(f"the deployments could not be made; see {services.log('deploy')}")
    services.start("worker", "prefect", "worker", "start", "--pool", POOL, "--type", "process")
    services.wait_until("mlflow", lambda: answers(f"http://{HOST}:{mlflow_port}/health"))
    services.wait_until("feedback", lambda: answers(f"http://{HOST}:{feedback_port}/health"))


def main() -> None:
    root = Path.cwd().resolve()
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell started us with SIGINT ignored
        signal.signal(number, _interrupt)
    services: Services | None = None
    try:
        check_workspace(root)
        prefect_port = free_port(int(os.environ.get("RLHF_PREFECT_PORT", "4200")))
        mlflow_port = free_port(int(os.environ.get("RLHF_MLFLOW_PORT", "5000")))
        feedback_port = free_port(int(os.environ.get("RLHF_FEEDBACK_PORT", "8600")))
        services = Services(root, environment(root, prefect_port, mlflow_port))
        print("starting (about half a minute) ...", flush=True)
        start_all(services, root, prefect_port, mlflow_port, feedback_port)
        print(ready_text(prefect_port, mlflow_port, feedback_port, root), flush=True)
        services.watch()
    except KeyboardInterrupt:
        print("\nstopping ...", flush=True)
    except RLHFError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave half of them running
        if services is not None:
            with contextlib.suppress(KeyboardInterrupt):
                services.stop()
    print("stopped", flush=True)


def ready_text(prefect_port: int, mlflow_port: int, feedback_port: int, root: Path) -> str:
    return (
        f"Prefect   http://{HOST}:{prefect_port}    Deployments > train > Run runs {root} in a worktree\n"
        f"MLflow    http://{HOST}:{mlflow_port}\n"
        f"Feedback  http://{HOST}:{feedback_port}    "
        "sign in as manager, token in .rlhf/feedback/manager.token\n"
        f"from a shell:  PREFECT_API_URL=http://{HOST}:{prefect_port}/api "
        "prefect deployment run train/train\n"
        "Ctrl-C stops everything."
    )


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
