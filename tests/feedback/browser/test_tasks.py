"""Each kind of task in a real browser, by keyboard alone; drafts, lost connections, phones, large text."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from feedback.records import Role
from feedback.tables import flags, skips

from .conftest import ONE, THREE, TWO, picture, playwright, press, project_of, wait_for_votes


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
