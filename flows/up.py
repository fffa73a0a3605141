"""`make up`: Prefect's server, a process work pool with a worker, the deployments, MLflow's server and the
annotation service.

On loopback and the workspace's own SQLite files unless flows/settings.py is told otherwise; until Ctrl-C.
Nothing is left running after.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import FrameType

from flows import settings
from flows.settings import Settings
from rlhf_core.errors import RLHFError
from rlhf_core.layout import Layout
from rlhf_core.parent_death import die_with_parent
from tasks.network import HOST, answers, free_port
from tasks.processes import end_tree
from tasks.workspace import check_workspace

POOL = "rlhf-process"
START_SECONDS = 120.0
MOST_RESTARTS = 3


class Services:
    """The processes that were started, ended in the opposite order."""

    def __init__(self, root: Path, env: Mapping[str, str]) -> None:
        self._root, self._env = root, dict(env)
        self._logs = Layout(root).state / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._commands: dict[str, tuple[str, ...]] = {}
        self._more: dict[str, dict[str, str]] = {}
        self.running: dict[str, subprocess.Popen] = {}

    def start(self, name: str, *command: str, env: Mapping[str, str] | None = None) -> None:
        """Start a service with `env` beside what all get; its output goes to .rlhf/logs/NAME.log."""
        again = name in self._commands
        self._commands[name] = command
        self._more[name] = dict(env or {})
        with self.log(name).open("ab" if again else "wb") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=self._root,
                env=self._env | self._more[name],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()),
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
                self.start(name, *self._commands[name], env=self._more[name])
            time.sleep(1.0)

    def run(self, name: str, fault: str, *command: str, env: Mapping[str, str] | None = None) -> None:
        """Run a command to its end. Raises RLHFError with its own message when it fails."""
        self.start(name, *command, env=env)
        status = self.running[name].wait(timeout=START_SECONDS)
        self.running.pop(name)
        if status != 0:
            said = [line for line in self.log(name).read_text().splitlines() if line.startswith("error: ")]
            raise RLHFError(said[-1].removeprefix("error: ") if said else f"{fault}; see {self.log(name)}")

    def stop(self) -> None:
        for process in reversed(self.running.values()):
            end_tree(process)


def start_all(services: Services, wanted: Settings) -> None:
    """Databases and servers first, then pool and deployment, then the worker that needs both."""
    if given := settings.preparation(wanted):
        services.run("databases", "the databases could not be made", "flows.databases", env=given)
    prefect = ("prefect", "server", "start", "--host", wanted.host, "--port", str(wanted.prefect_port))
    services.start("prefect", *prefect, env=settings.prefect_server(wanted))
    mlflow = ("mlflow", "server", "--host", wanted.host, "--port", str(wanted.mlflow_port), "--workers", "1")
    login = ("--app-name", "basic-auth") if wanted.login else ()
    services.start("mlflow", *mlflow, *login, env=settings.mlflow_server(wanted))
    services.start("feedback", "feedback.cli", "serve", "--host", HOST, "--port", str(wanted.feedback_port))
    services.wait_until("prefect", lambda: answers(f"{wanted.prefect_url}/api/health"))
    services.run("deploy", "the deployments could not be made", "flows.deploy")
    services.start("worker", "prefect", "worker", "start", "--pool", POOL, "--type", "process")
    services.wait_until("mlflow", lambda: answers(f"{wanted.mlflow_url}/health"))
    services.wait_until("feedback", lambda: answers(f"http://{HOST}:{wanted.feedback_port}/health"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="rlhf up", description=__doc__)
    parser.add_argument("--host", default=HOST, help="the address to listen on")
    host = parser.parse_args().host
    root = Path.cwd().resolve()
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell started us with SIGINT ignored
        signal.signal(number, _interrupt)
    services: Services | None = None
    try:
        check_workspace(root)
        settings.read(root, host, 0, 0, 0, os.environ)  # a mistake is said before anything is looked for
        prefect_port = free_port(int(os.environ.get("RLHF_PREFECT_PORT", "4200")), host)
        mlflow_port = free_port(int(os.environ.get("RLHF_MLFLOW_PORT", "5000")), host)
        feedback_port = free_port(int(os.environ.get("RLHF_FEEDBACK_PORT", "8600")), HOST)
        wanted = settings.read(root, host, prefect_port, mlflow_port, feedback_port, os.environ)
        services = Services(root, settings.clients(wanted, os.environ))
        print("starting (about half a minute) ...", flush=True)
        start_all(services, wanted)
        print(ready_text(wanted), flush=True)
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


def ready_text(wanted: Settings) -> str:
    prefect = f"http://{wanted.public_host}:{wanted.prefect_port}"
    who = (
        f"log in as {wanted.login.partition(':')[0]}, with the password of RLHF_AUTH\n"
        if wanted.login
        else ""
    )
    return (
        f"Prefect   {prefect}    Deployments > train > Run runs {wanted.root} in a worktree\n"
        f"MLflow    http://{wanted.public_host}:{wanted.mlflow_port}\n{who}"
        f"Feedback  http://{HOST}:{wanted.feedback_port}    "
        "sign in as manager, token in .rlhf/feedback/manager.token\n"
        f"from a shell:  PREFECT_API_URL={prefect}/api prefect deployment run train/train\n"
        "Ctrl-C stops everything."
    )


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
