"""The load benchmark ends the service that it started, also when it is stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest


@pytest.mark.parametrize("at_work", [False, True])
def test_a_load_that_is_stopped_leaves_no_service_behind(root, at_work):
    command = [sys.executable, "-m", "benchmarks.load", "--annotators", "1", "--items", "9", "--pause", "0.1"]
    with subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL) as load:
        seen = psutil.Process(load.pid)
        until(lambda: seen.children(recursive=True))
        if at_work:  # an annotator stays connected; who asks whether it answers does not
            until(lambda: all(is_connected(seen) for _ in range(10)))
        services = seen.children(recursive=True)
        load.send_signal(signal.SIGTERM)
        load.wait(60)
    _, left = psutil.wait_procs(services, timeout=10)
    for service in left:
        service.kill()
    assert not left


def is_connected(process):
    time.sleep(0.02)
    return any(one.status == psutil.CONN_ESTABLISHED for one in process.net_connections("tcp"))


def until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
