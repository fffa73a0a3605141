"""The real service in a process of its own."""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import sys
import time

import httpx

from tasks.network import free_port


class Serving:
    """`rlhf feedback serve` on a port of its own; `kill` gives it no chance to tidy up."""

    def __init__(self, directory, *options, port=None):
        self.port = port or free_port(20_000 + secrets.randbelow(20_000))
        self.url = f"http://127.0.0.1:{self.port}"
        self.database = directory / "feedback.db"
        command = [sys.executable, "-m", "feedback.cli", "serve", "--port", str(self.port)]
        self.process = subprocess.Popen(
            [*command, "--database", str(self.database), *options], cwd=directory, stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while not self._answers():
            assert self.process.poll() is None, "the service ended while starting"
            assert time.monotonic() < deadline, "the service did not start"
            time.sleep(0.05)

    def _answers(self):
        try:
            return httpx.get(f"{self.url}/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.terminate()
        self.process.wait(30)


@contextlib.contextmanager
def serving(directory, *options):
    service = Serving(directory, *options)
    try:
        yield service
    finally:
        service.stop()
