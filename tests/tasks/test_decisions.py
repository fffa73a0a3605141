"""A decision from a shell lets the flow run go on that waits for it in Prefect."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tasks import decisions
from tasks.promotion import Promotion


class Prefect(BaseHTTPRequestHandler):
    """Takes the input of a waiting run from whoever logs in as ann."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, json.loads(body)))
        login = base64.b64encode(b"ann:a long: password").decode()
        known = self.headers.get("Authorization") == f"Basic {login}"
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"status": self.server.status}).encode() if known else b"{}")

    def log_message(self, *args):
        pass


@pytest.fixture
def prefect(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Prefect)
    server.asked, server.status = [], "ACCEPT"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "ann:a long: password")
    yield server
    server.shutdown()
    server.server_close()


def waiting(prefect, **tags):
    api = f"http://127.0.0.1:{prefect.server_port}/api"
    return Promotion("0" * 32, "rlhf-policy", {"prefect.api": api, "prefect.flow_run": "r1", **tags})


def test_the_run_gets_what_its_form_would_have_got(prefect):
    assert decisions.resume_flow_run(waiting(prefect), "approve", "Ann", "reads well")
    typed = {"decision": "approve", "name": "Ann", "reason": "reads well"}
    assert prefect.asked == [("/api/flow_runs/r1/resume", {"run_input": typed})]


def test_a_run_that_does_not_wait_and_a_server_that_knows_nobody_are_told(prefect, monkeypatch):
    prefect.status = "REJECT"
    assert not decisions.resume_flow_run(waiting(prefect), "approve", "Ann", "reads well")
    prefect.status = "ACCEPT"
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "ann:wrong")
    assert not decisions.resume_flow_run(waiting(prefect), "approve", "Ann", "reads well")
    monkeypatch.delenv("PREFECT_API_AUTH_STRING")
    assert not decisions.resume_flow_run(waiting(prefect), "approve", "Ann", "reads well")


def test_without_a_server_a_decision_stands_by_itself(prefect):
    away = waiting(prefect, **{"prefect.api": "http://127.0.0.1:9/api"})
    assert not decisions.resume_flow_run(away, "approve", "Ann", "reads well")
    nobody = waiting(prefect, **{"prefect.flow_run": ""})
    assert not decisions.resume_flow_run(nobody, "approve", "Ann", "reads well")
    assert prefect.asked == []
