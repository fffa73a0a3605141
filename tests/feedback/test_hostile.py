"""What people with bad intent may send: refused, logged, harmless."""

from __future__ import annotations

import html.parser

import pytest

from feedback import accounts
from feedback.projects import create_project
from feedback.records import EventType, Item, Project, Role
from feedback.web.app import create_app
from feedback.web.context import Settings
from feedback.web.security import MOST_BODY, Rates
from feedback.web.text import markdown

from .conftest import Visitor, pairs, person

ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](http://evil.example/pixel.png)",
    "<javascript:alert(1)>",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    '"><svg onload=alert(1)>',
    "</textarea><script>alert(1)</script>",
    "{{ 7 * 7 }}{% raw %}",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "[a](http://x 'onmouseover=alert(1)')",
    "`` ` <b onclick=alert(1)>``",
]


class Finder(html.parser.HTMLParser):
    """Collects what could run or load something."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        if tag in ("iframe", "img", "object", "embed", "style", "base", "audio", "video"):
            self.found.append(tag)
        for name, value in attrs:
            if name.startswith("on") or (value or "").strip().lower().startswith(("javascript:", "data:")):
                self.found.append((tag, name, value))
            if tag == "script" and name == "src" and not value.startswith("/static/"):
                self.found.append((tag, value))
        if tag == "script" and "src" not in dict(attrs):
            self.found.append(tag)


def dangers(text):
    finder = Finder()
    finder.feed(text)
    return finder.found


@pytest.mark.parametrize("attack", ATTACKS)
def test_markdown_of_strangers_runs_and_loads_nothing(attack):
    assert not dangers(str(markdown(attack)))


@pytest.mark.parametrize("text", ["```py\nx <b>\n```", "    x <b>", "|a|b|\n|-|-|\n|<b>|2|"])
def test_what_may_be_wider_than_the_page_can_be_focused(text):
    found = str(markdown(text))
    assert found.startswith(('<pre tabindex="0">', '<table tabindex="0">'))
    assert "&lt;b&gt;" in found


def test_the_finder_finds():
    assert len(dangers("<script>1</script><img onerror=x><a href=' JavaScript:1'>")) == 4


@pytest.mark.parametrize("attack", ATTACKS)
def test_scripts_in_prompts_answers_names_reasons_and_critiques_stay_text(store, visitor, attack):
    project = Project(id="p", name=attack, kind="critique", guidelines=attack)
    row = Item(
        id="i",
        project="p",
        kind="critique",
        responses=[{"text": attack}],
        messages=[{"role": "system", "content": attack}, {"role": "user", "content": attack}],
    )
    create_project(store, "system", project, [row])
    ann, boss = visitor("ann"), visitor("boss", Role.MANAGER)
    accounts.add_annotator(store, "system", attack)
    ann.http.post("/p/p/flag", data=ann.fields("/p/p", "flag") | {"reason": attack})
    pages = [ann.get("/p/p"), boss.get("/manage/p/p")]
    ann.http.post("/p/p/undo", data={"csrf": ann.csrf})
    pages += [ann.get("/p/p"), ann.get("/p/p/guidelines"), ann.get("/")]
    assert ann.vote(text=attack).status_code == 303
    pages += [boss.get(path) for path in ("/manage", "/manage/p/p", "/manage/people", "/manage/log")]
    for page in pages:
        assert page.status_code == 200
        assert not dangers(page.text)
        assert "49" not in page.text or "{{" not in attack or "7 * 7" in page.text


def test_strangers_see_the_sign_in_alone(app, store):
    pairs(store, 1)
    stranger = Visitor(app)
    for path in (
        "/",
        "/p/p",
        "/manage",
        "/manage/p/p",
        "/manage/p/p/votes.jsonl",
        "/manage/p/p/pairs",
        "/manage/log",
        "/adjudicate/p",
    ):
        answer = stranger.get(path)
        assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    assert stranger.http.post("/p/p/vote", data={"item": "p-0"}).status_code == 401
    for path in ("/docs", "/openapi.json", "/redoc", "/static/../app.py", "/static/%2e%2e/app.py"):
        assert stranger.get(path).status_code == 404


@pytest.mark.parametrize("token", ["", "x" * 32, "../../etc/passwd", "a" * 5000, "' OR 1=1 --", "é"])
def test_a_forged_session_is_nobody(app, token):
    answer = Visitor(app).get("/", headers={"Cookie": f"rlhf-feedback={token}".encode()})
    assert answer.status_code == 303


@pytest.mark.parametrize("csrf", [None, "", "0" * 64, "é"])
def test_a_form_without_the_right_token_is_refused_and_logged(store, visitor, csrf):
    pairs(store, 1)
    ann = visitor()
    form = ann.fields("/p/p") | {"choice": "tie"}
    form.pop("csrf")
    if csrf is not None:
        form["csrf"] = csrf
    assert ann.script("/p/p/vote", form).status_code == 403
    assert not store.views()["votes"]
    last = store.events(newest=1)[0]
    assert last.type is EventType.REQUEST_REFUSED
    assert last.payload["path"] == "/p/p/vote"


def test_the_token_of_one_session_is_no_use_in_another(store, visitor):
    pairs(store, 1)
    ann, bob = visitor("ann"), visitor("bob")
    form = ann.fields("/p/p") | {"choice": "tie", "csrf": bob.csrf}
    assert ann.script("/p/p/vote", form).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_request_from_another_site_is_refused_even_with_the_token(store, visitor, headers):
    pairs(store, 1)
    ann = visitor()
    form = ann.fields("/p/p") | {"choice": "tie"}
    assert ann.http.post("/p/p/vote", data=form, headers=headers).status_code == 403
    assert not store.views()["votes"]


def test_another_annotators_item_is_refused_and_logged(store, visitor):
    pairs(store, 2)
    ann, bob = visitor("ann"), visitor("bob")
    item = ann.fields("/p/p")["item"]
    form = bob.fields("/p/p") | {"item": item, "choice": "tie"}
    for path in ("vote", "skip", "flag", "turn"):
        answer = bob.script(f"/p/p/{path}", form | {"reason": "mine", "text": "hi"})
        assert answer.status_code == 403, path
        assert store.events(newest=1)[0].type is EventType.REQUEST_REFUSED
    assert not store.views()["votes"]


def test_roles_are_held_at_every_door(store, visitor):
    pairs(store, 1)
    ann, judge = visitor("ann"), visitor("judge", Role.ADJUDICATOR)
    doors = ["/manage", "/manage/p/p", "/manage/people", "/manage/log", "/manage/p/p/votes.jsonl"]
    for path in doors:
        assert ann.get(path).status_code == judge.get(path).status_code == 403
    assert ann.get("/adjudicate/p").status_code == 403
    posts = [
        "/manage/upload",
        "/manage/people",
        "/manage/people/x",
        "/manage/people/x/erase",
        "/manage/p/p/guidelines",
        "/manage/p/p/clear",
    ]
    for who in (ann, judge):
        for path in posts:
            assert who.http.post(path, data={"csrf": who.csrf}).status_code == 403, path
    assert ann.http.post("/adjudicate/p", data={"csrf": ann.csrf}).status_code == 403


def test_a_body_that_is_too_large_is_refused_whatever_it_says_of_its_length(store, visitor):
    pairs(store, 1)
    ann = visitor()
    form = ann.fields("/p/p") | {"choice": "tie"}
    assert ann.http.post("/p/p/vote", data=form | {"x": "y" * (MOST_BODY + 1)}).status_code == 413

    def chunks():
        yield b"csrf=" + form["csrf"].encode() + b"&x="
        for _ in range(20):
            yield b"y" * 100_000

    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    assert ann.http.post("/p/p/vote", content=chunks(), headers=kind).status_code == 413
    assert not store.views()["votes"]
    assert store.events(newest=1)[0].type is EventType.REQUEST_REFUSED


@pytest.mark.parametrize("body", [b"\xff\xfe", b"csrf", b"[]", b"a=" * 200])
@pytest.mark.parametrize(
    "kind", ["application/json", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_a_body_that_is_no_form_is_an_error_and_no_crash(store, visitor, body, kind):
    pairs(store, 1)
    answer = visitor().http.post("/p/p/vote", content=body, headers={"Content-Type": kind})
    assert 400 <= answer.status_code < 500


@pytest.mark.parametrize(
    "fields",
    [
        {"choice": "2:1"},
        {"choice": "0:9"},
        {"choice": "0:99999999999999999999"},
        {"choice": "-1:1"},
        {"choice": "tie", "key": "a b"},
        {"choice": "tie", "key": ""},
        {"choice": "tie", "item": "nobody"},
        {"choice": "0:²"},
    ],
)
def test_fields_that_no_page_sends_are_refused(store, visitor, fields):
    pairs(store, 1)
    ann = visitor()
    assert ann.script("/p/p/vote", ann.fields("/p/p") | fields).status_code == 422
    assert not store.views()["votes"]


@pytest.mark.parametrize("act", ["x", "-1", "1e3", "²", "9" * 30])
def test_an_undo_of_no_act_is_refused(store, visitor, act):
    pairs(store, 2)
    ann = visitor()
    ann.vote(choice="tie")
    assert ann.script("/p/p/undo", {"csrf": ann.csrf, "act": act}).status_code == 422
    assert len(store.views()["votes"]) == 1


@pytest.mark.parametrize("seconds", ["nan", "inf", "-5", "1e400", "abc"])
def test_times_that_cannot_be_are_bounded_by_the_server(store, clock, visitor, seconds):
    pairs(store, 1)
    ann = visitor()
    form = ann.fields("/p/p") | {"choice": "tie", "seconds": seconds}
    clock.pass_by(7)
    ann.script("/p/p/vote", form)
    (row,) = store.views()["votes"]
    assert row[4]["seconds"] == 7.0


def test_guessing_secrets_is_slowed_down(store):
    person(store, "ann")
    app = create_app(store, Settings(rates=Rates(sign_ins=5)))
    guesser = Visitor(app)
    codes = [
        guesser.http.post("/login", data={"name": "ann", "secret": f"guess number {n}"}).status_code
        for n in range(8)
    ]
    assert codes == [401] * 5 + [429] * 3
    right = guesser.http.post("/login", data={"name": "ann", "secret": "secret of ann"})
    assert right.status_code == 429


def test_too_many_requests_are_refused_with_a_time_to_wait(store):
    person(store, "ann")
    ann = Visitor(create_app(store, Settings(rates=Rates(per_session=5))), "ann")
    answers = [ann.get("/") for _ in range(7)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 2
    assert answers[-1].headers["retry-after"] == "60"


def test_another_host_name_is_refused(app):
    assert Visitor(app, base="http://evil.example").get("/login").status_code == 400


def test_the_cookie_cannot_be_read_by_scripts_nor_sent_from_other_sites(store):
    person(store, "ann")
    for secure in (False, True):
        app = create_app(store, Settings(secure=secure))
        answer = Visitor(app).http.post("/login", data={"name": "ann", "secret": "secret of ann"})
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=lax" in cookie
        assert ("secure" in cookie) is secure
