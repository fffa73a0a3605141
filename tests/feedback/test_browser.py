"""Each kind of task in a real browser, by keyboard alone; drafts, lost connections, phones, large text.

Chromium is driven by Playwright; where no Chromium is found the tests skip. `RLHF_SCREENSHOTS=DIRECTORY`
keeps pictures of what was seen.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import uvicorn
from sqlalchemy import select

from feedback.policies import EchoPolicy
from feedback.projects import create_project
from feedback.records import Item, Project, Role
from feedback.store import Store
from feedback.tables import flags, skips, votes
from feedback.web.app import create_app
from feedback.web.context import Settings

from .conftest import person

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

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
    """A browser that is killed at the end, its contexts still open: to close one hangs now and then."""
    profile = tmp_path_factory.mktemp("chromium")
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
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Service:
    def __init__(self, store):
        policies = {"x": EchoPolicy("Left out"), "y": EchoPolicy("Put in")}
        config = uvicorn.Config(create_app(store, Settings(policies=policies)), log_level="warning")
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


@pytest.fixture
def real_store(tmp_path):
    opened = Store(tmp_path / "feedback.db")
    yield opened
    opened.close()


@pytest.fixture
def service(real_store):
    started = Service(real_store)
    yield started
    started.stop()


@pytest.fixture
def visit(browser, service, real_store):
    """A signed-in page; the sign-in itself by keyboard."""
    pages = []

    def come(path, name="Ann", role=Role.ANNOTATOR, **options):
        person(real_store, name, role)
        context = browser.new_context(base_url=service.url, **options)
        page = context.new_page()
        pages.append(page)
        page.problems = []
        page.on("console", lambda message: message.type == "error" and page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.goto("/")
        page.locator("input[name=name]:focus").wait_for()
        page.keyboard.type(name)
        page.keyboard.press("Tab")
        page.keyboard.type(f"secret of {name}")
        page.keyboard.press("Enter")
        page.wait_for_url(service.url + "/")
        page.goto(path)
        return page

    yield come
    for page in pages:
        page.context.set_offline(False)
        with contextlib.suppress(playwright.Error):  # a vote's own way to the next page may come between
            page.goto("about:blank")


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
            id=f"i{n}",
            project="p",
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


@pytest.mark.parametrize(
    ("keys", "choice", "strength"),
    [("1", 0, 1), ("11", 0, 2), ("111", 0, 3), ("2", 1, 1), ("122", 1, 2), ("0", "tie", 0), ("1b", "bad", 0)],
)
def test_pairs_by_keyboard(real_store, visit, keys, choice, strength):
    project_of(real_store, "pairwise", [ONE, TWO])
    page = visit("/p/p")
    press(page, *keys)
    picture(page, "pairwise") if keys == "11" else None
    press(page, "Enter")
    (record,) = wait_for_votes(real_store, 1)
    wanted = choice if isinstance(choice, str) else "ab"[record["sides"][choice]]
    assert (record["value"]["choice"], record["value"]["strength"]) == (wanted, strength)
    page.wait_for_selector("text=1 done, 1 left")
    assert not page.problems


def test_ranking_by_keyboard_with_a_tie(real_store, visit):
    project_of(real_store, "ranking", [ONE, TWO, THREE, "Freeze it."])
    page = visit("/p/p")
    press(page, "3", "1", "=", "4")
    picture(page, "ranking")
    press(page, "Enter")
    (record,) = wait_for_votes(real_store, 1)
    by_position = [record["value"]["ranks"][response] for response in record["sides"]]
    assert by_position == [2, 3, 1, 2]
    assert not page.problems


def test_ranking_by_dragging_and_by_arrows(real_store, visit):
    project_of(real_store, "ranking", [THREE, TWO, "Freeze it."])
    page = visit("/p/p")
    first, last = (
        page.locator(".handle").nth(0).bounding_box(),
        page.locator("#ranking li").nth(2).bounding_box(),
    )
    page.mouse.move(first["x"] + 5, first["y"] + 5)
    page.mouse.down()
    page.mouse.move(last["x"] + 60, last["y"] + last["height"] - 3, steps=8)
    page.mouse.up()
    assert page.locator("#ranking li").evaluate_all("rows => rows.map(r => r.dataset.letter)") == [
        "B",
        "C",
        "A",
    ]
    page.get_by_label("Answer C one up").focus()
    press(page, "Enter")
    press(page, "Control+Enter")
    (record,) = wait_for_votes(real_store, 1)
    assert [record["value"]["ranks"][response] for response in record["sides"]] == [3, 2, 1]


@pytest.mark.parametrize(("scale", "keys", "expected"), [(5, "513", [5, 1, 3]), (10, "071", [10, 7, 1])])
def test_ratings_by_keyboard(real_store, visit, scale, keys, expected):
    project_of(real_store, "rating", [ONE], scale=scale)
    page = visit("/p/p")
    press(page, *keys)
    press(page, "ArrowUp", keys[1])  # the middle line once more
    picture(page, f"rating-{scale}")
    press(page, "Enter")
    (record,) = wait_for_votes(real_store, 1)
    assert [record["value"]["ratings"][name] for name in ("helpful", "correct", "harmless")] == expected
    assert not page.problems


@pytest.mark.parametrize(("key", "good"), [("1", True), ("2", False)])
def test_labels_by_keyboard(real_store, visit, key, good):
    project_of(real_store, "label", [ONE])
    page = visit("/p/p")
    press(page, key, "Enter")
    (record,) = wait_for_votes(real_store, 1)
    assert record["value"]["good"] is good


@pytest.mark.parametrize("kind", ["critique", "correction"])
def test_texts_by_keyboard(real_store, visit, kind):
    project_of(real_store, kind, [TWO])
    page = visit("/p/p")
    press(page, "e", "Control+a" if kind == "correction" else "End")
    page.keyboard.type("Not the fridge: 1 s f u ? 0\n")
    press(page, "Enter", "Control+Enter")
    (record,) = wait_for_votes(real_store, 1)
    assert record["value"]["text"] == "Not the fridge: 1 s f u ? 0"
    assert not page.problems


def test_a_blind_chat_by_keyboard(real_store, visit):
    project_of(real_store, "chat", ["", ""])
    page = visit("/p/p")
    press(page, "e")
    page.keyboard.type("Hello, you two")
    press(page, "Control+Enter")
    page.wait_for_selector("text=Put in: Hello, you two")
    picture(page, "chat")
    press(page, "2", "2", "Enter")
    (record,) = wait_for_votes(real_store, 1)
    assert record["value"] == {"kind": "choice", "choice": "ab"[record["sides"][1]], "strength": 2}
    assert not page.problems


def test_skip_flag_undo_guidelines_and_help_by_keyboard(real_store, visit):
    project_of(real_store, "pairwise", [ONE, TWO], count=4)
    page = visit("/p/p")
    press(page, "g")
    page.get_by_text("Prefer the answer").wait_for()
    press(page, "g", "?")
    page.get_by_text("skip, with a reason").wait_for()
    picture(page, "help")
    press(page, "Escape", "s")
    page.keyboard.type("I cannot decide")
    press(page, "Enter")
    page.wait_for_selector("text=0 done, 3 left")
    press(page, "f")
    page.keyboard.type("It names a person")
    press(page, "Enter")
    page.wait_for_selector("text=0 done, 2 left")
    with real_store.read() as connection:
        assert connection.scalar(select(skips.c.reason)) == "I cannot decide"
        assert connection.scalar(select(flags.c.reason)) == "It names a person"
    press(page, "g", "g", "0", "Enter")  # closed again, the guidelines do not catch the Enter
    page.wait_for_selector("text=1 done, 1 left")
    press(page, "u")
    page.wait_for_selector("text=0 done, 2 left")
    press(page, "u")
    page.wait_for_selector("text=0 done, 3 left")


def test_a_draft_outlives_a_reload_and_a_lost_connection(real_store, visit):
    project_of(real_store, "critique", [TWO])
    page = visit("/p/p")
    press(page, "e")
    page.keyboard.type("A thought that took long")
    page.reload()
    assert page.locator("textarea").input_value() == "A thought that took long"
    page.context.set_offline(True)
    press(page, "e", "Control+Enter")
    page.get_by_text("No connection").wait_for()
    picture(page, "offline")
    page.context.set_offline(False)
    (record,) = wait_for_votes(real_store, 1)
    assert record["value"]["text"] == "A thought that took long"
    page.wait_for_selector("text=1 done")
    assert page.locator("textarea").input_value() == ""  # the next item has no draft


def test_an_answer_that_was_lost_on_the_way_counts_once(real_store, visit):
    project_of(real_store, "pairwise", [ONE, TWO])
    page = visit("/p/p")
    lost = []

    def lose(route):
        if lost:
            route.continue_()
        else:
            lost.append(route.fetch().status)  # the server has the vote; the page never learns of it
            route.abort()

    page.route("**/vote", lose)
    press(page, "1", "Enter")
    page.wait_for_selector("text=1 done, 1 left", timeout=15000)
    assert lost == [200]
    assert len(wait_for_votes(real_store, 1)) == 1


@pytest.mark.parametrize("kind", ["pairwise", "ranking", "rating"])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (640, 360)])  # a phone; 1280 x 720 at 200 %
def test_a_small_page_needs_no_sideways_scrolling(real_store, visit, kind, width, height):
    texts = {"pairwise": [ONE, TWO], "ranking": [ONE, TWO, THREE], "rating": [ONE]}[kind]
    project_of(real_store, kind, texts, scale=10)
    page = visit("/p/p", viewport={"width": width, "height": height})
    picture(page, f"{kind}-{width}")
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(overflow) <= 0


def test_every_field_and_button_has_a_name_for_a_screen_reader(real_store, visit):
    project_of(real_store, "ranking", [ONE, TWO, THREE])
    page = visit("/p/p")
    unnamed = page.evaluate(
        """() => Array.from(document.querySelectorAll(
            "button, input:not([type=hidden]), select, textarea, a, svg"))
        .filter(e => !e.closest("[aria-hidden=true]") && !e.textContent.trim()
            && !e.getAttribute("aria-label") && !(e.labels && e.labels[0] && e.labels[0].textContent.trim()))
        .map(e => e.outerHTML)"""
    )
    assert unnamed == []
    assert page.locator("h1").count() == 1
    assert page.locator("[role=status]").count() == 1


def test_the_pages_policy_stops_an_injected_script(real_store, visit):
    project_of(real_store, "pairwise", [ONE, TWO])
    page = visit("/p/p")
    page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        " document.body.append(s); }"
    )
    assert page.evaluate("window.ran") is None


def test_the_dashboard_in_a_browser(real_store, visit):
    project_of(real_store, "pairwise", [ONE, TWO], count=3)
    ann = visit("/p/p")
    boss = visit("/manage/p/p", name="Boss", role=Role.MANAGER)
    assert "0 of 3" in boss.locator(".numbers").inner_text().replace("\n", " ")
    press(ann, "1", "Enter")
    wait_for_votes(real_store, 1)
    playwright.expect(boss.locator(".numbers dd").first).to_have_text("1 of 3", timeout=15000)
    assert not boss.problems
