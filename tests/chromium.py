"""A real Chromium for the tests of pages, driven by Playwright; where there is none those tests skip."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.contextmanager
def open_browser(profile: Path) -> Iterator[Any]:
    """A browser that is killed at the end, its contexts still open: to close one hangs now and then.

    Playwright keeps an event loop in this thread while the browser is open, and nothing else can have one
    meanwhile, so it is opened for one module and no longer.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
    where = (f"--user-data-dir={profile}", "--no-first-run", "--remote-debugging-port=0", "about:blank")
    process = subprocess.Popen(
        [CHROMIUM, *options, *where],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        port = profile / "DevToolsActivePort"
        until = time.monotonic() + 60
        while not (port.is_file() and port.read_text().strip()):
            assert process.poll() is None, "the browser ended"
            assert time.monotonic() < until, "the browser did not start"
            time.sleep(0.1)
        with playwright.sync_playwright() as driver:
            yield driver.chromium.connect_over_cdp(f"http://127.0.0.1:{port.read_text().split()[0]}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
