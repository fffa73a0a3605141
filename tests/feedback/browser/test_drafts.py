"""What an annotator wrote is not lost: not with the connection, the page, the session or the database."""

from __future__ import annotations

import sqlite3

from sqlalchemy import select

from feedback.tables import flags, sessions, skips

from .conftest import ONE, TWO, picture, press, project_of, wait_for_votes


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


def test_a_locked_database_is_told_and_the_vote_is_sent_again(real_store, visit, tmp_path):
    project_of(real_store, "pairwise", [ONE, TWO])
    page = visit("/p/p")
    other = sqlite3.connect(tmp_path / "feedback.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    press(page, "1", "Enter")
    page.get_by_text("Not saved yet").wait_for()
    assert "nothing was saved" in page.locator("#status").inner_text()
    picture(page, "locked")
    other.execute("ROLLBACK")
    other.close()
    wait_for_votes(real_store, 1)
    page.wait_for_selector("text=1 done, 1 left", timeout=15000)


def test_a_draft_outlives_the_session(real_store, visit):
    project_of(real_store, "critique", [TWO])
    page = visit("/p/p")
    press(page, "e")
    page.keyboard.type("Written over lunch")
    with real_store.write() as connection:
        connection.execute(sessions.delete())
    press(page, "Control+Enter")
    page.get_by_text("Your session has ended").wait_for()
    page.get_by_role("link", name="Sign in").click()
    page.locator("input[name=name]:focus").wait_for()
    page.keyboard.type("Ann")
    press(page, "Tab")
    page.keyboard.type("secret of Ann")
    press(page, "Enter")
    page.get_by_role("link", name="Begin").click()
    page.wait_for_selector("#vote")
    assert page.locator("textarea").input_value() == "Written over lunch"
    press(page, "e", "Control+Enter")
    (record,) = wait_for_votes(real_store, 1)
    assert record["value"]["text"] == "Written over lunch"


def test_a_vote_taken_back_leaves_its_answer_to_be_changed(real_store, visit):
    project_of(real_store, "correction", [TWO])
    page = visit("/p/p")
    press(page, "e", "Control+a")
    page.keyboard.type("A long text with one mitsake")
    press(page, "Control+Enter")
    page.wait_for_selector("text=1 done, 1 left")
    press(page, "u")
    page.wait_for_selector("text=0 done, 2 left")
    assert page.locator("textarea").input_value() == "A long text with one mitsake"
    press(page, "e", "Control+a")
    page.keyboard.type("A long text without a mistake")
    press(page, "Control+Enter")
    page.wait_for_selector("text=1 done, 1 left")
    (record,) = wait_for_votes(real_store, 1)
    assert record["value"]["text"] == "A long text without a mistake"
    assert not page.problems


def test_reasons_and_undos_outlive_a_lost_connection_and_count_once(real_store, visit):
    project_of(real_store, "pairwise", [ONE, TWO], count=4)
    page = visit("/p/p")
    page.context.set_offline(True)
    press(page, "s")
    page.keyboard.type("I cannot decide")
    press(page, "Enter")
    page.get_by_text("No connection").wait_for()
    page.context.set_offline(False)
    page.wait_for_selector("text=0 done, 3 left", timeout=15000)
    lost = []

    def lose(route):
        if route.request.url in lost:
            route.continue_()
        else:
            lost.append(route.request.url)
            assert route.fetch().status == 200  # the server has it; the page never learns of it
            route.abort()

    for act in ("flag", "vote", "undo"):
        page.route(f"**/{act}", lose)
    press(page, "f")
    page.keyboard.type("It names a person")
    press(page, "Enter")
    page.wait_for_selector("text=0 done, 2 left", timeout=15000)
    press(page, "1", "Enter")
    page.wait_for_selector("text=1 done, 1 left", timeout=15000)
    press(page, "u")
    page.wait_for_selector("text=0 done, 2 left", timeout=15000)
    assert len(lost) == 3
    with real_store.read() as connection:
        assert connection.scalars(select(skips.c.reason)).all() == ["I cannot decide"]
        assert connection.scalars(select(flags.c.cleared)).all() == [False]
