"""`rlhf up` in a checkout as a test drives it, and a run as its machine shows it: processes, worktree."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from tasks.network import free_port

from .checkouts import processes_below, run, start, wait_for
from .prefect_api import PrefectApi


class Services:
    """`rlhf up` on free ports. It can be killed like a machine that loses its power, and started again."""

    def __init__(self, checkout: Path, log: Path) -> None:
        self.checkout, self.log = checkout, log
        ports = {"PREFECT": 4650, "MLFLOW": 5650, "FEEDBACK": 8650}
        self._ports = {f"RLHF_{name}_PORT": str(free_port(port)) for name, port in ports.items()}
        self.start()

    def start(self) -> None:
        self.up = start(["rlhf", "up"], self.checkout, self.log, **self._ports)
        try:
            wait_for(lambda: self.up.poll() is not None or "Ctrl-C stops" in self.log.read_text(), 240)
            assert self.up.poll() is None, self.log.read_text()
        except AssertionError:
            self.lose_power()
            raise
        self.url, self.mlflow, self.feedback = re.findall(
            r"^\w+ +(http://127\.0\.0\.1:\d+)", self.log.read_text(), re.M
        )
        self.prefect = PrefectApi(self.url)

    def stop(self) -> None:
        """Ctrl-C; everything that was started is gone after it."""
        self.up.send_signal(signal.SIGINT)
        assert self.up.wait(90) == 0, self.log.read_text()
        assert self.log.read_text().rstrip().endswith("stopped")
        wait_for(lambda: not processes_below(self.checkout), 20)

    def lose_power(self) -> None:
        """Nothing gets a chance to say anything, and nothing of it goes on."""
        while victims := [p for p in (self.up.pid, *processes_below(self.checkout)) if alive(p)]:
            for pid in victims:
                kill(pid)
        self.up.wait()


@contextlib.contextmanager
def serving(checkout: Path, log: Path) -> Iterator[Services]:
    """Services for the block; they end by Ctrl-C, and by force where the block fails."""
    found = Services(checkout, log)
    try:
        yield found
        found.stop()
    finally:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            if found.up.poll() is None:
                found.up.send_signal(signal.SIGINT)
                found.up.wait(90)
        found.lose_power()


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


class RunHere:
    """A run of the deployment `train` as its checkout and the process table show it."""

    def __init__(self, checkout: Path, flow_run: str) -> None:
        self._checkout, self.id, self._short = checkout, flow_run, flow_run.replace("-", "")[:8]

    @property
    def worktree(self) -> Path | None:
        """None before the run has one, and after it has ended well."""
        found = list((self._checkout / ".rlhf" / "worktrees").glob(f"*-{self._short}"))
        return found[0] if found else None

    @property
    def kept(self) -> Path:
        """Logs and state, beside the checkout."""
        (found,) = (self._checkout / ".rlhf" / "kept").glob(f"*-{self._short}")
        return found

    def processes(self) -> dict[int, str]:
        """Of its training: DVC, the shell that it starts, the stage."""
        return processes_below(self.worktree) if self.worktree else {}

    def checkpoints(self, stage: str) -> list[str]:
        """Names of the finished checkpoints of a stage that trains."""
        if self.worktree is None:
            return []
        found = (self.worktree / ".rlhf" / "runs" / stage / "checkpoints").glob("[!.]*/*.json")
        return sorted({path.parent.name for path in found})

    def log(self, stage: str) -> str:
        """What the stage has printed, over all its attempts."""
        place = self.worktree or self.kept
        path = place / ".rlhf" / "runs" / stage / "output.log"
        return path.read_text() if path.is_file() else ""

    def first_steps(self, stage: str) -> list[int]:
        """The step at which each attempt began, as its progress bar says; 0 is the beginning."""
        attempts = self.log(stage).split(f"> rlhf {stage}\n")[1:]
        bars = [re.search(rf"{stage}: .*?\| (\d+)/\d+ \[", attempt) for attempt in attempts]
        return [int(bar.group(1)) for bar in bars if bar]

    def committed(self, name: str) -> Any:
        """The content of a file on the branch of the run."""
        done = run(["git", "show", f"runs/{self.kept.name}:{name}"], self._checkout)
        assert done.returncode == 0, done.stderr
        return yaml.safe_load(done.stdout)
