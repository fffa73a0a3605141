"""The real service in a process of its own, and visitors who vote over HTTP."""

from __future__ import annotations

import html
import re
import secrets
import subprocess
import sys
import time

import httpx

from tasks.network import free_port


class Serving:
    """`rlhf feedback serve` on a port of its own; `kill` gives it no chance to tidy up."""

    def __init__(self, directory, *options):
        self.port = free_port(20_000 + secrets.randbelow(20_000))
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
            time.sleep(0.1)

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


class Voter:
    """Signs in and votes, as the page's script does."""

    def __init__(self, url, name):
        self.http = httpx.Client(base_url=url, timeout=30)
        answer = self.http.post("/login", data={"name": name, "secret": f"secret of {name}"})
        assert answer.status_code == 303, answer.text

    def vote(self, project, choice):
        """Vote on the next item. Returns the key once the server has it, None when nothing is left."""
        text = self.http.get(f"/p/{project}").text
        form = re.search(r'<form id="vote".*?</form>', text, re.S)
        if form is None:
            return None
        fields = dict(re.findall(r'type="hidden" name="([^"]+)" value="([^"]*)"', form.group(0)))
        fields = {name: html.unescape(value) for name, value in fields.items()}
        answer = self.http.post(
            f"/p/{project}/vote", data=fields | {"choice": choice}, headers={"Accept": "application/json"}
        )
        assert answer.status_code == 200, answer.text
        return fields["key"]
