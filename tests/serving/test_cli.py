"""`rlhf serve` as a process: options, what it says, and how it ends."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
from typer.testing import CliRunner

from rlhf_core.errors import InputError
from serving import cli
from tasks.network import free_port

from .conftest import HELLO


class Process:
    def __init__(self, directory, model, *options, **env):
        self.port = free_port(20_000 + secrets.randbelow(20_000))
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "serving.cli", "--model", str(model), "--port", str(self.port)]
        self.process = subprocess.Popen(
            [*command, *options],
            cwd=directory,
            env=os.environ | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self):
        while not (line := self.process.stdout.readline()).startswith(f"Serve     {self.url} "):
            assert line, "it ended while starting"
        deadline = time.monotonic() + 60
        while not self._answers():
            assert time.monotonic() < deadline, "it did not start"
            time.sleep(0.05)

    def _answers(self):
        try:
            return httpx.get(f"{self.url}/healthz", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def chat(self, **values):
        return httpx.post(f"{self.url}/v1/chat/completions", json={"messages": HELLO} | values, timeout=60)


@pytest.fixture
def start(tiny_model_dir, tmp_path):
    made = []

    def begin(*options, **env):
        made.append(Process(tmp_path, tiny_model_dir, *options, **env))
        made[-1].wait()  # kept before: also one that does not start is ended
        return made[-1]

    yield begin
    for one in made:
        one.process.kill()
        one.process.communicate()


def test_sigterm_ends_what_runs_and_exits_well(start, tmp_path):
    server = start("--log-with-consent", "--context", "0", "--max-tokens", "4000")
    agreed = {"metadata": {"consent": "true"}}
    assert server.chat(max_tokens=3, **agreed).json()["feedback"] == {"stored": True}
    assert (tmp_path / ".rlhf" / "feedback" / "users.key").is_file()
    found = []

    def ask():
        body = {"messages": HELLO, "max_tokens": 450, "seed": 3, "stream": True, "temperature": 2}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as reply:
            for line in reply.iter_lines():
                found.append(line)
                if len(found) == 1:
                    server.process.send_signal(signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert [line for line in found if line][-1] == "data: [DONE]"
    said = server.process.communicate(timeout=30)[0]
    assert server.process.returncode in (0, -signal.SIGTERM)
    assert "draining: " in said
    assert "Traceback" not in said


def test_answers_that_take_longer_than_the_limit_are_told(start):
    server = start("--context", "0", "--max-tokens", "4000", "--drain-seconds", "0")
    found = []

    def ask():
        body = {"max_tokens": 450, "seed": 3, "temperature": 2, "n": 8}
        found.append(server.chat(**body))

    thread = threading.Thread(target=ask)
    thread.start()
    while httpx.get(f"{server.url}/healthz").json()["in_flight"] == 0:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    thread.join()
    assert (found[0].status_code, found[0].json()["error"]["code"]) == (503, "not_answered")
    server.process.communicate(timeout=30)


def test_beyond_loopback_a_key_is_needed(monkeypatch):
    monkeypatch.delenv(cli.KEY_VARIABLE, raising=False)
    assert cli._key("127.0.0.1") == ""
    with pytest.raises(InputError, match=r"RLHF_SERVE_KEY: listening on 0\.0\.0\.0 needs a key of 16"):
        cli._key("0.0.0.0")
    monkeypatch.setenv(cli.KEY_VARIABLE, "short")
    for host in ("0.0.0.0", "127.0.0.1"):
        with pytest.raises(InputError, match="16 characters or more, found 5"):
            cli._key(host)
    monkeypatch.setenv(cli.KEY_VARIABLE, "x" * 16)
    assert cli._key("0.0.0.0") == "x" * 16


def test_options_that_do_not_go_together_are_told(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    told = run(cli.app, ["--model", str(tiny_model_dir), "--challenger", "candidate"]).exception
    assert "--challenger goes with the registry's champion" in str(told)
    told = run(cli.app, ["--model", "nowhere"]).exception
    assert "--model nowhere: there is no nowhere" in str(told)
    assert run(cli.app, ["--share", "1.5"]).exit_code == 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert "has no champion and no candidate" in str(run(cli.app, []).exception)
