"""A real Chromium, the service in this process, and people who are signed in.

Driven by Playwright; where no Chromium is found the tests skip. `RLHF_SCREENSHOTS=DIRECTORY` keeps pictures
of what was seen.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from pathlib import Path

import playwright.sync_api as playwright
import pytest
import uvicorn
from sqlalchemy import select

from feedback import accounts
from feedback.policies import EchoPolicy
from feedback.projects import create_project
from feedback.records import Item, Project, Role
from feedback.store import Store
from feedback.tables import votes
from feedback.web.app import create_app
from feedback.web.context import Settings

from ...chromium import open_browser
from ..conftest import person

ASK = [{"role": "user", "content": "How do I keep bread fresh for longer?"}]
ONE = """Keep it in a **paper bag** inside a bread box.

- cut side down
- away from the sun

It stays good for three days."""
TWO = "Put it in the fridge, well wrapped. Cold keeps most food fresh, so it should work for bread too."
THREE = "Buy less bread."
GUIDE = "Prefer the answer that is **true** first, then the one that helps more."


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


class Service:
    def __init__(self, store):
        policies = {"x": EchoPolicy("Left out"), "y": EchoPolicy("Put in")}
        config = uvicorn.Config(create_app(store, Settings(policies=policies)), log_level="warning")
        self.store = store
        self.server = uvicorn.Server(config)
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)

    def stop(self):
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()


def signed_in(browser, service, name, **options):
    """A page of somebody who has signed in before; `problems` are what it complained of."""
    context = browser.new_context(base_url=service.url, **options)
    if name:
        _, token = accounts.sign_in(service.store, name, f"secret of {name}")
        context.add_cookies([{"name": Settings().cookie, "value": token, "url": service.url}])
    page = context.new_page()
    page.problems = []
    page.on("console", lambda message: message.type == "error" and page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    return page


def leave(page):
    page.context.set_offline(False)
    with contextlib.suppress(playwright.Error):  # a vote's own way to the next page may come between
        page.goto("about:blank")


@pytest.fixture
def real_store(tmp_path):
    """With the clock of the wall, and little patience for a locked database."""
    opened = Store(tmp_path / "feedback.db", busy_seconds=0.5)
    yield opened
    opened.close()


@pytest.fixture
def service(real_store):
    started = Service(real_store)
    yield started
    started.stop()


@pytest.fixture
def visit(browser, service, real_store):
    """Make an account and open a page as that person."""
    pages = []

    def come(path, name="Ann", role=Role.ANNOTATOR, **options):
        person(real_store, name, role)
        pages.append(signed_in(browser, service, name, **options))
        pages[-1].goto(path)
        return pages[-1]

    yield come
    for page in pages:
        leave(page)


def picture(page, name):
    directory = os.environ.get("RLHF_SCREENSHOTS")
    if directory:
        page.screenshot(path=str(Path(directory) / f"{name}.png"), full_page=True)


def project_of(store, kind, texts, count=2, **fields):
    criteria = ("helpful", "correct", "harmless") if kind == "rating" else ()
    values = {"id": "p", "name": "Bread and other questions", "kind": kind, "criteria": criteria}
    project = Project(**(values | {"guidelines": GUIDE} | fields))
    rows = [
        Item(
            id=f"{project.id}-{n}",
            project=project.id,
            kind=kind,
            messages=[] if kind == "chat" else ASK,
            responses=[{"text": text, "policy": "xy"[k % 2]} for k, text in enumerate(texts)],
        )
        for n in range(count)
    ]
    create_project(store, "system", project, rows)


def wait_for_votes(store, number):
    for _ in range(200):
        with store.read() as connection:
            found = [row.record for row in connection.execute(select(votes).where(votes.c.undone.is_(False)))]
        if len(found) >= number:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{len(found)} votes after 10 s")


def press(page, *keys):
    for key in keys:
        page.keyboard.press(key)
