"""Every page under axe: light and dark, on a desk, on a phone, at 200 %; nothing serious is found.

axe-core comes by npm into a directory of its own in the virtual environment (`make test` does it); where it
is missing these tests skip.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from feedback import assignment
from feedback.projects import create_project
from feedback.records import Choice, Item, Project, Role
from feedback.store import Store

from ..conftest import person
from .conftest import ASK, GUIDE, ONE, THREE, TWO, Service, leave, picture, press, project_of, signed_in

AXE = Path(sys.prefix) / "axe" / "node_modules" / "axe-core" / "axe.min.js"
pytestmark = pytest.mark.skipif(
    not AXE.is_file(), reason="axe is not installed; `make test` does it with npm"
)

VIEWS = [  # colours and width; 640 x 360 is what 1280 x 720 shows at 200 %
    ("light", 1280, 800),
    ("dark", 390, 844),
    ("light", 640, 360),
    ("dark", 1280, 800),
]
TEXTS = {
    "pairwise": [ONE, TWO],
    "ranking": [ONE, TWO, THREE],
    "rating": [ONE],
    "label": [ONE],
    "critique": [TWO],
    "correction": [TWO],
    "chat": ["", ""],
}
RICH = """# A title
> quoted

| a | b |
| --- | --- |
| 1 | 2 |

```
code_that_is_longer_than_the_page = is_wide(so_that, it_has_to_be_moved, from_side_to_side, by_who_reads_it)
```
1. one
2. [a link](https://example.org)"""


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A service with a project of each kind, votes, a dispute, a flag, a skip and people of each role."""
    store = Store(tmp_path_factory.mktemp("everything") / "feedback.db")
    for kind, texts in TEXTS.items():
        project_of(store, kind, texts, id=kind, name=f"Bread: {kind}")
    project_of(store, "rating", [ONE], id="rating-10", name="Bread in ten steps", scale=10)
    _disputes(store)
    ann, bob, _, _ = (person(store, name, role) for name, role in PEOPLE)
    for who, choice in ((ann, "a"), (bob, "b")):
        shown = assignment.next_item(store, who, "disputed")
        assignment.cast_vote(store, who, shown.item.id, f"k-{choice}", Choice(choice=choice, strength=3), 9.0)
    for act in (assignment.flag_item, assignment.skip_item):
        act(store, ann, assignment.next_item(store, ann, "disputed").item.id, "It names a person")
    service = Service(store)
    yield service
    service.stop()
    store.close()


PEOPLE = [
    ("Ann", Role.ANNOTATOR),
    ("Bob", Role.ANNOTATOR),
    ("Boss", Role.MANAGER),
    ("Old", Role.ANNOTATOR),
]


def _disputes(store):
    rules = {"overlap_votes": 2, "overlap_share": 1.0, "gold_share": 0.0, "guidelines": GUIDE}
    project = Project(id="disputed", name="Disputed", kind="pairwise", **rules)
    rows = [
        Item(
            id=f"d-{number}",
            project="disputed",
            kind="pairwise",
            messages=[{"role": "system", "content": "Be brief."}, *ASK],
            responses=[{"text": RICH}, {"text": TWO}],
        )
        for number in range(4)
    ]
    create_project(store, "system", project, rows)


@pytest.fixture
def look(browser, everything):
    pages = []

    def at(path, name):
        pages.append(signed_in(browser, everything, name))
        pages[-1].goto(path)
        return pages[-1]

    yield at
    for page in pages:
        leave(page)


def findings(page, name):
    """What axe says in each view, one line for each element."""
    page.evaluate(AXE.read_text())  # by the debugger, so that the page's policy need not allow it
    found = []
    for colours, width, height in VIEWS:
        page.emulate_media(color_scheme=colours, reduced_motion="reduce")  # no colour on its way to another
        page.set_viewport_size({"width": width, "height": height})
        picture(page, f"{name}-{colours}-{width}")
        report = page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
        found += [
            f"{colours} {width}: {rule['impact']} {rule['id']}: {node['html'][:120]} {node['failureSummary']}"
            for rule in report["violations"]
            for node in rule["nodes"]
        ]
        overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(overflow) <= 0, f"{name} is wider than {width}"
    return found


PAGES = {
    "sign-in": ("/login", None),
    "projects": ("/", "Ann"),
    "guidelines": ("/p/pairwise/guidelines", "Ann"),
    "finished": ("/p/disputed", "Ann"),
    "not-found": ("/p/nothing", "Ann"),
    "disputed": ("/p/disputed", "Bob"),
    "adjudicate": ("/adjudicate/disputed", "Boss"),
    "adjudicated": ("/adjudicate/label", "Boss"),
    "manage": ("/manage", "Boss"),
    "dashboard": ("/manage/p/disputed", "Boss"),
    "people": ("/manage/people", "Boss"),
    "log": ("/manage/log", "Boss"),
}


@pytest.mark.parametrize("name", PAGES)
def test_nothing_serious_on_a_page(look, name):
    path, who = PAGES[name]
    page = look(path, who)
    for details in page.locator("main details").all():
        details.evaluate("one => { one.open = true; }")
    assert findings(page, name) == []


@pytest.mark.parametrize("kind", [*TEXTS, "rating-10"])
def test_nothing_serious_on_a_task_with_an_answer_given_and_everything_open(look, kind):
    page = look(f"/p/{kind}", "Ann")
    if kind == "chat":
        press(page, "e")
        page.keyboard.type("Hello")
        press(page, "Control+Enter")
        page.wait_for_selector("text=Put in: Hello")
    press(page, "1")
    for name in ("guidelines", "help", "skip", "flag"):
        page.locator(f"#{name}").evaluate("one => { one.open = true; }")
    page.evaluate("() => say('Not saved yet: the server is busy.', 'warn')")
    assert findings(page, kind) == []


def test_axe_sees_what_is_wrong(look):
    """The check itself: a picture without words and grey on grey are found."""
    page = look("/login", None)
    page.evaluate(
        """() => { const p = document.createElement('p'); p.textContent = 'pale'; p.style.color = '#bbb';
        p.style.background = '#ccc'; document.querySelector('main').append(p, new Image()); }"""
    )
    found = " ".join(findings(page, "wrong"))
    assert "color-contrast" in found
    assert "image-alt" in found
