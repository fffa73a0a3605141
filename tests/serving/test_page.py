"""The page in a real browser, by keyboard alone: chat with streaming, consent, thumbs, a key, a failure.

`RLHF_SCREENSHOTS=DIRECTORY` keeps pictures of what was seen.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from feedback.gathering import gather
from feedback.production import COMMENTS, PRODUCTION
from feedback.records import Label
from serving.service import Limits

from ..chromium import open_browser
from .conftest import until

playwright = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def visit(browser):
    def come(server, **options):
        page = browser.new_context(base_url=server.url, **options).new_page()
        page.problems = []
        page.on("console", lambda message: message.type == "error" and page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.outside = []
        page.on("request", lambda r: r.url.startswith(server.url) or page.outside.append(r.url))
        page.goto("/")
        return page

    return come


def picture(page, name):
    if directory := os.environ.get("RLHF_SCREENSHOTS"):
        page.screenshot(path=Path(directory) / f"{name}.png")


def test_chat_and_thumbs_by_keyboard_alone(serve, store, recorder, visit):
    server = serve(recorder=recorder)
    page = visit(server, viewport={"width": 900, "height": 760})
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the skip link
    page.keyboard.type("hello there")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")  # consent
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Good answer").wait_for()
    (item,) = gather(store, PRODUCTION).items
    assert item.messages[0].content == "hello there"
    answer = page.locator(".message.assistant div").inner_text()
    assert " ".join(answer.split()) == " ".join(item.responses[0].text.split())
    assert page.locator(".message.assistant .speaker").inner_text() == item.responses[0].policy
    page.get_by_role("button", name="Bad answer").focus()
    page.keyboard.press("Enter")
    page.get_by_text("it is kept").wait_for()
    assert page.get_by_role("button", name="Bad answer").get_attribute("aria-pressed") == "true"
    assert [vote.value for vote in gather(store, PRODUCTION).votes] == [Label(good=False)]
    page.keyboard.press("Tab")
    page.keyboard.type("be <b>kinder</b>")
    page.keyboard.press("Enter")
    page.get_by_text("your comment is kept").wait_for()
    assert [vote.value.text for vote in gather(store, COMMENTS).votes] == ["be <b>kinder</b>"]
    picture(page, "serve")
    assert page.problems == []
    assert page.outside == []


def test_without_consent_there_are_no_thumbs_and_a_second_turn_sees_the_first(serve, store, recorder, visit):
    # Short answers: with a long first one the second turn would not fit into the tiny model's context.
    server = serve(recorder=recorder, limits=Limits(slots=4, most_tokens=24))
    page = visit(server)
    for number, words in enumerate(("hello", "<img src=x onerror=alert(1)>"), 1):
        page.get_by_label("Your message").fill(words)
        page.get_by_role("button", name="Send").click()
        until(lambda: page.locator(".message").count() == 2 * number)  # noqa: B023
        page.get_by_text("Writing …").wait_for(state="hidden")
    assert page.get_by_role("button", name="Good answer").count() == 0
    assert page.locator("#log img").count() == 0  # text, never markup
    assert gather(store, PRODUCTION).items == ()
    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".message").count() == 0
    assert page.problems == []


def test_a_key_is_asked_for_and_a_wrong_one_is_told(serve, visit):
    server = serve(limits=Limits(slots=4, key="a key of many characters"))
    page = visit(server, viewport={"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.get_by_label("Your message").fill("hello")
    page.keyboard.press("Enter")
    page.get_by_text("this server asks for its key").wait_for()
    page.get_by_label("Key of this server").fill("a key of many characters")
    page.keyboard.press("Enter")
    page.get_by_label("Your message").fill("hello")
    page.keyboard.press("Enter")
    until(lambda: page.locator(".message.assistant .speaker").last.inner_text().startswith("toy/"))
    assert page.get_by_label("Key of this server").is_hidden()
