"""A `vllm serve` of this stage's own: started, waited for, ended. vLLM stays in an environment of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.config import PPOConfig, VLLMConfig
from rlhf_core.errors import InputError, RLHFError
from rlhf_core.parent_death import die_with_parent
from rlhf_core.ports import HOST, unused_port

if TYPE_CHECKING:
    import httpx

GRACE_SECONDS = 10.0
TAIL_LINES = 12
# Of this process alone: its packages, and its place among the ranks of a training.
NOT_INHERITED = (
    "PYTHONPATH", "PYTHONHOME", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
)  # fmt: skip
SETTINGS = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


class RolloutEngineError(RLHFError):
    """The server ended, did not answer, or answered what cannot be used; another try may go well."""


@dataclass(frozen=True)
class Server:
    """A running server. `key` keeps other users of this machine from giving it orders."""

    process: subprocess.Popen
    port: int
    key: str
    log: Path

    def client_options(self) -> dict[str, Any]:
        """Of an httpx client; proxies are for what is not this machine."""
        headers = {"Authorization": f"Bearer {self.key}"}
        return {"base_url": f"http://{HOST}:{self.port}", "headers": headers, "trust_env": False}

    def fault(self, what: str) -> RolloutEngineError:
        """The error that says `what`, whether the server still runs, and what it said last."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=1.0)
        status = self.process.poll()
        ended = "" if status is None else f"; it has ended with status {status}"
        said = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        return RolloutEngineError("\n  ".join([f"vLLM: {what}{ended}. The end of {self.log}:", *said]))


def find_program(config: VLLMConfig) -> str:
    """Raises InputError when there is none."""
    found = shutil.which(config.program)
    if found is None:
        raise InputError(
            f"ppo.vllm.program = {config.program!r}: no such program; pip install vllm in an environment of "
            "its own and name its bin/vllm, or set ppo.rollout_engine to own"
        )
    return found


def check_program(config: PPOConfig) -> None:
    """Raises InputError where PPO would need a program that is not there."""
    if config.rollout_engine == "vllm":
        find_program(config.vllm)


@contextlib.contextmanager
def serving(
    config: VLLMConfig, model: Path, options: Sequence[str], log: Path, say: Callable[[str], None]
) -> Iterator[Server]:
    """A server of `model` that answers; it ends with the block, or with this process.

    Raises InputError without a program, RolloutEngineError when the server does not come up.
    """
    port, key = unused_port(), secrets.token_hex(16)
    where = ["--host", HOST, "--port", str(port)]
    command = [find_program(config), "serve", str(model.resolve()), *where, *options]
    environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment | SETTINGS | {"VLLM_API_KEY": key},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
    try:
        server = Server(process, port, key, log)
        _wait_until_healthy(server, config.start_seconds, say)
        yield server
    finally:
        _end(process)


def _wait_until_healthy(server: Server, seconds: float, say: Callable[[str], None]) -> None:
    import httpx

    started = time.monotonic()
    say(f"waits for vLLM to come up; its log is {server.log}")
    with httpx.Client(timeout=5.0, **server.client_options()) as client:
        while time.monotonic() - started < seconds:
            if server.process.poll() is not None:
                raise server.fault("it did not come up")
            if _is_healthy(client):
                say(f"vLLM answers, after {time.monotonic() - started:.0f} s")
                return
            time.sleep(0.2)
    raise server.fault(f"it does not answer after ppo.vllm.start_seconds = {seconds:g}")


def _is_healthy(client: httpx.Client) -> bool:
    import httpx

    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def _end(process: subprocess.Popen) -> None:
    """TERM, some seconds of grace, KILL: to the group, since the server has processes of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
