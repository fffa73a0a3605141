"""Each kind of task in a real browser, by keyboard alone; on phones, with large text."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from feedback.tables import flags, skips

from .conftest import ONE, THREE, TWO, picture, press, project_of, wait_for_votes


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


@pytest.mark.parametrize("finger", [False, True])
def test_a_ranking_dragged_on_a_phone_or_with_a_mouse_lands_where_it_is_dropped(real_store, visit, finger):
    project_of(real_store, "ranking", [THREE, TWO, "Freeze it."])
    page = visit("/p/p", viewport={"width": 390, "height": 844}, has_touch=finger, is_mobile=finger)
    handle, first = (
        page.locator(".handle").nth(2).bounding_box(),
        page.locator("#ranking li").nth(0).bounding_box(),
    )
    start = (handle["x"] + 8, handle["y"] + 8)
    end = (start[0], first["y"] + 4)
    drag(page, start, end, finger)
    order = "rows => rows.map(r => r.dataset.letter)"
    assert page.locator("#ranking li").evaluate_all(order) == ["C", "A", "B"]
    assert page.locator("#ranking select").evaluate_all("all => all.map(s => s.value)") == ["1", "2", "3"]
    assert page.evaluate("scrollY") == 0  # the page stays where it is under the finger
    page.locator(".primary").click()
    (record,) = wait_for_votes(real_store, 1)
    assert [record["value"]["ranks"][response] for response in record["sides"]] == [2, 3, 1]


def drag(page, start, end, finger):
    steps = [(start[0], start[1] + (end[1] - start[1]) * k / 8) for k in range(1, 9)]
    if not finger:
        page.mouse.move(*start)
        page.mouse.down()
        for step in steps:
            page.mouse.move(*step)
        page.mouse.up()
        return
    debugger = page.context.new_cdp_session(page)
    touches = [("touchStart", start), *(("touchMove", step) for step in steps), ("touchEnd", None)]
    for kind, at in touches:
        points = [{"x": at[0], "y": at[1]}] if at else []
        debugger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


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
