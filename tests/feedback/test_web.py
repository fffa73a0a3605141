"""The pages, as a browser without scripts and as the page's own script use them."""

from __future__ import annotations

import json
import sqlite3

import pytest
from sqlalchemy import select

from feedback import accounts, assignment
from feedback.gathering import gather, queue_state
from feedback.projects import create_project
from feedback.records import Choice, Item, Project, Role
from feedback.store import Store
from feedback.tables import votes
from feedback.web.app import create_app

from .conftest import Visitor, pair, pairs, person

ASK = [{"role": "user", "content": "How are you?"}]
KINDS = {
    "pairwise": ({"responses": [{"text": "one"}, {"text": "two"}]}, {"choice": "1:3"}),
    "ranking": ({"responses": [{"text": t} for t in "abc"]}, {"rank-0": "2", "rank-1": "1", "rank-2": "2"}),
    "rating": ({"responses": [{"text": "one"}]}, {"rating-0": "4", "rating-1": "1"}),
    "label": ({"responses": [{"text": "one"}]}, {"label": "bad"}),
    "critique": ({"responses": [{"text": "one"}]}, {"text": "too short\r\nand cold"}),
    "correction": ({"responses": [{"text": "one"}]}, {"text": "Fine, and you?"}),
}


def one_item(store, kind, **fields):
    criteria = ("helpful", "true") if kind == "rating" else ()
    project = Project(id="p", name="P", kind=kind, criteria=criteria)
    create_project(store, "system", project, [Item(id="i", project="p", kind=kind, messages=ASK, **fields)])


def stored(store):
    with store.read() as connection:
        return [row.record for row in connection.execute(select(votes).where(votes.c.undone.is_(False)))]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_shown_voted_and_stored(store, visitor, kind):
    fields, answer = KINDS[kind]
    one_item(store, kind, **fields)
    ann = visitor()
    page = ann.get("/p/p")
    assert page.status_code == 200
    assert "How are you?" in page.text
    assert ann.vote(**answer).headers["location"] == "/p/p"
    (record,) = stored(store)
    value = record["value"]
    match kind:
        case "pairwise":
            assert value["choice"] == "ab"[record["sides"][1]]
            assert value["strength"] == 3
        case "ranking":
            by_position = [value["ranks"][response] for response in record["sides"]]
            assert by_position == [2, 1, 2]
        case "rating":
            assert value["ratings"] == {"helpful": 4, "true": 1}
        case "label":
            assert value["good"] is False
        case "critique":
            assert value["text"] == "too short\nand cold"
        case "correction":
            assert value["text"] == "Fine, and you?"
    assert "Nothing is left for you here" in ann.get("/p/p").text


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_form_is_refused_with_a_reason_and_the_item_stays(store, visitor, kind):
    fields, _ = KINDS[kind]
    one_item(store, kind, **fields)
    ann = visitor()
    answer = ann.script("/p/p/vote", ann.fields("/p/p"))
    assert answer.status_code == 422
    assert answer.json()["error"]
    assert not stored(store)
    assert "How are you?" in ann.get("/p/p").text


def test_answers_are_blind_and_stand_on_their_sides(store, visitor):
    pairs(store, 30)
    ann = visitor()
    for _ in range(30):
        page = ann.get("/p/p").text
        for secret in ("sft", "ppo", "policy", "sides", "gold"):
            assert secret not in page.replace("/static/", "")
        ann.vote(choice="0:1")
    first = {(r["value"]["choice"], tuple(r["sides"])) for r in stored(store)}
    assert first == {("a", (0, 1)), ("b", (1, 0))}  # always the left one


def test_a_form_sent_twice_counts_once(store, visitor):
    pairs(store, 2)
    ann = visitor()
    form = ann.fields("/p/p") | {"choice": "tie", "seconds": "0"}
    for _ in range(3):
        assert ann.script("/p/p/vote", form).json() == {"next": "/p/p"}
    assert len(stored(store)) == 1
    changed = ann.script("/p/p/vote", form | {"choice": "bad"})
    assert changed.status_code == 409
    assert "counted before" in changed.json()["error"]


def test_skip_flag_and_undo_from_the_page(store, visitor):
    pairs(store, 3)
    ann = visitor()
    for act in ("skip", "flag"):
        form = ann.fields("/p/p", act) | {"reason": "it names <b>a person</b>"}
        assert ann.http.post(f"/p/p/{act}", data=form).status_code == 303
    assert queue_state(store, "p").num_flagged == 1
    ann.http.post("/p/p/undo", data=ann.fields("/p/p", "undo"))
    assert queue_state(store, "p").num_flagged == 0
    empty = ann.http.post("/p/p/skip", data=ann.fields("/p/p", "skip") | {"reason": "  "})
    assert empty.status_code == 422


def test_an_undone_vote_needs_a_new_key_and_says_so(store, visitor):
    pairs(store, 1)
    ann = visitor()
    form = ann.fields("/p/p") | {"choice": "tie"}
    ann.script("/p/p/vote", form)
    ann.http.post("/p/p/undo", data={"csrf": ann.csrf})
    again = ann.script("/p/p/vote", form)
    assert (again.status_code, again.json()["new_key"]) == (409, True)
    assert ann.script("/p/p/vote", form | {"key": "another"}).status_code == 200


def test_a_blind_chat_gives_each_policy_its_own_conversation(store, visitor):
    project = Project(id="c", name="C", kind="chat")
    row = Item(id="c-1", project="c", kind="chat", responses=[{"policy": "x"}, {"policy": "y"}])
    create_project(store, "system", project, [row])
    ann = visitor()
    assert ann.script("/p/c/vote", ann.fields("/p/c") | {"choice": "0:1"}).status_code == 422
    turn = ann.fields("/p/c", "turn") | {"text": "Hello"}
    for _ in range(2):
        assert ann.http.post("/p/c/turn", data=turn).status_code == 303
    page = ann.get("/p/c").text
    assert page.count("Left out: Hello") == page.count("Put in: Hello") == 1
    assert ann.vote("c", **{"choice": "0:2"}).status_code == 303
    (record,) = stored(store)
    assert record["value"]["choice"] == "ab"[record["sides"][0]]


def test_a_policy_that_fails_is_told_without_its_name(store, app, visitor):
    class Broken:
        def reply(self, messages):
            raise RuntimeError("secret-model-name is out of memory")

    app.state.settings.policies["x"] = Broken()
    project = Project(id="c", name="C", kind="chat")
    row = Item(id="c-1", project="c", kind="chat", responses=[{"policy": "x"}, {"policy": "y"}])
    create_project(store, "system", project, [row])
    ann = visitor()
    answer = ann.script("/p/c/turn", ann.fields("/p/c", "turn") | {"text": "Hello"})
    assert answer.status_code == 502
    assert "secret" not in answer.text
    assert not assignment.next_item(store, _who(store), "c").turns


def _who(store):
    from feedback.accounts import find_by_name

    return find_by_name(store, "ann")


def test_a_manager_makes_a_project_from_a_file_and_adds_to_it(store, visitor):
    boss = visitor("boss", Role.MANAGER)
    row = json.dumps({"prompt": "Hi", "responses": ["a", {"text": "b", "policy": "m"}], "group": "g"})
    fields = {
        "csrf": boss.csrf,
        "id": "new",
        "name": "New",
        "kind": "pairwise",
        "overlap_votes": "2",
        "overlap_share": "1",
        "guidelines": "Be *kind*.",
    }
    answer = boss.http.post("/manage/upload", data=fields, files={"file": ("q.jsonl", row + "\n")})
    assert answer.headers["location"] == "/manage/p/new"
    assert queue_state(store, "new").votes_needed == 2
    assert "<em>kind</em>" in boss.get("/p/new/guidelines").text
    more = {"csrf": boss.csrf, "project": "new"}
    twice = boss.http.post("/manage/upload", data=more, files={"file": ("q.jsonl", row)})
    assert twice.status_code == 409
    other = boss.http.post("/manage/upload", data=more, files={"file": ("q.jsonl", row.replace("Hi", "Ho"))})
    assert other.status_code == 303
    assert queue_state(store, "new").num_items == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the file is empty"),
        ("{", "line 1: "),
        ("[1]", "line 1: 1; must be a JSON object"),
        ('{"prompt": "x", "responses": ["y"]}', "a pairwise item has 2 responses, found 1"),
        ('{"prompt": "x", "responses": ["a", "b"], "sides": 1}', "line 1: sides: unknown key"),
        ('{"prompt": "x", "responses": ["a", 5]}', "responses.1"),
    ],
)
def test_a_file_that_is_wrong_makes_nothing_and_names_the_line(store, visitor, text, reason):
    boss = visitor("boss", Role.MANAGER)
    fields = {"csrf": boss.csrf, "id": "new", "name": "New", "kind": "pairwise"}
    answer = boss.http.post("/manage/upload", data=fields, files={"file": ("q.jsonl", text)})
    assert answer.status_code == 422
    assert reason in answer.text
    assert "/manage/p/new" not in boss.get("/manage").text


def test_the_dashboard_shows_votes_accuracy_bias_agreement_and_cost(store, clock, visitor):
    right = {"kind": "choice", "choice": "a", "strength": 1}
    project = Project(id="p", name="P", kind="pairwise", overlap_votes=2, overlap_share=1.0, gold_share=0.5)
    create_project(store, "system", project, [pair(n, gold=right if n % 3 == 0 else None) for n in range(15)])
    for name, answer in (("ann", "0:2"), ("bob", "1:1")):
        who = visitor(name)
        while 'id="vote"' in who.get("/p/p").text:
            clock.pass_by(4)
            assert who.vote(choice=answer, seconds="3").status_code == 303
    boss = visitor("boss", Role.MANAGER)
    page = boss.get("/manage/p/p").text
    for expected in ('20 <span class="soft">of 20', "ann", "bob", "3.0", "<svg", "alpha", "Further votes"):
        assert expected in page
    part = boss.get("/manage/p/p?part=live").text
    assert "<html" not in part
    exported = boss.get("/manage/p/p/votes.jsonl").text.splitlines()
    assert len(exported) == len(gather(store, "p").votes) == len(stored(store))


def test_an_adjudicator_decides_what_is_disputed(store, visitor):
    pairs(store, 1, overlap_votes=2, overlap_share=1.0)
    for name, answer in (("ann", "a"), ("bob", "b")):
        shown = assignment.next_item(store, person(store, name), "p")
        who = accounts.find_by_name(store, name)
        assignment.cast_vote(store, who, shown.item.id, name, Choice(choice=answer, strength=3), 1.0)
    judge = visitor("judge", Role.ADJUDICATOR)
    page = judge.get("/adjudicate/p").text
    assert "<li>A much better</li>" in page
    assert "<li>B much better</li>" in page
    assert "bob" not in page
    form = judge.fields("/adjudicate/p") | {"choice": "0:2"}
    assert judge.script("/adjudicate/p", form).json() == {"next": "/adjudicate/p"}
    assert "No item waits" in judge.get("/adjudicate/p").text
    assert len(gather(store, "p").decisions) == 1


def test_an_adjudicator_reads_every_conversation_of_a_disputed_chat(store, visitor):
    project = Project(id="c", name="C", kind="chat", overlap_votes=2, overlap_share=1.0)
    row = Item(id="c-1", project="c", kind="chat", responses=[{"policy": "x"}, {"policy": "y"}])
    create_project(store, "system", project, [row])
    for name, choice in (("ann", "x"), ("bob", "y")):
        who = visitor(name)
        who.http.post("/p/c/turn", data=who.fields("/p/c", "turn") | {"text": f"{name.upper()} ASKS"})
        first = who.get("/p/c").text
        x_is_first = first.index("Left out: ") < first.index("Put in: ")
        who.vote("c", choice="0:3" if x_is_first == (choice == "x") else "1:3")
    judge = visitor("judge", Role.ADJUDICATOR)
    page = judge.get("/adjudicate/c").text
    x_is_a = page.index("Left out: ANN ASKS") < page.index("Put in: ANN ASKS")
    assert x_is_a == (page.index("Left out: BOB ASKS") < page.index("Put in: BOB ASKS"))
    one, two = page.index("Conversation 1: "), page.index("Conversation 2: ")
    says = {name: "A" if x_is_a == (name == "ANN") else "B" for name in ("ANN", "BOB")}
    for name in ("ANN", "BOB"):
        part = page[one:two] if one < page.index(f"{name} ASKS") < two else page[two:]
        assert f": {says[name]} much better" in part[:40]
    assert "bob" not in page
    judge.script("/adjudicate/c", judge.fields("/adjudicate/c") | {"choice": "0:1"})
    assert gather(store, "c").decisions[0].value.choice == ("a" if x_is_a else "b")


def test_a_manager_sees_how_far_each_two_agree(store, visitor):
    pairs(store, 4, overlap_votes=2, overlap_share=1.0)
    boss = visitor("boss", Role.MANAGER)
    assert "No two people" in boss.get("/manage/p/p/pairs").text
    for name, answers in (("ann", "abab"), ("bob", "abbb")):
        who = person(store, name)
        for number, answer in enumerate(answers):
            shown = assignment.next_item(store, who, "p")
            value = Choice(choice=answer, strength=1)
            assignment.cast_vote(store, who, shown.item.id, f"{name}{number}", value, 1.0)
    page = boss.get("/manage/p/p/pairs").text
    # a b a b against a b b b: 3 of 4 the same; by chance 1/2 * 1/4 + 1/2 * 3/4 = 1/2; kappa = 1/2.
    assert "<td>choice</td><td>0.50</td><td>75 %</td><td>4</td>" in page
    assert visitor("cem").get("/manage/p/p/pairs").status_code == 403


def test_people_are_added_left_out_blocked_and_erased(store, visitor):
    boss = visitor("boss", Role.MANAGER)
    added = boss.http.post(
        "/manage/people", data={"csrf": boss.csrf, "name": "new <i>one</i>", "role": "annotator"}
    )
    assert "new &lt;i&gt;one&lt;/i&gt; is <code>" in added.text
    person_id = _id_of(store, "new <i>one</i>")
    for act, shows in (("exclude", "votes left out"), ("block", "may not sign in"), ("token", "<code>")):
        boss.http.post(f"/manage/people/{person_id}", data={"csrf": boss.csrf, "act": act})
        if act != "token":
            assert shows in boss.get("/manage/people").text
    wrong = boss.http.post(f"/manage/people/{person_id}/erase", data={"csrf": boss.csrf, "name": "someone"})
    assert wrong.status_code == 422
    gone = boss.http.post(
        f"/manage/people/{person_id}/erase", data={"csrf": boss.csrf, "name": "new <i>one</i>"}
    )
    assert "entries of the log were emptied" in gone.text
    assert "new &lt;i&gt;" not in boss.get("/manage/log").text


def _id_of(store, name):
    from feedback.accounts import find_by_name

    return find_by_name(store, name).id


def test_the_page_loads_nothing_from_elsewhere_and_has_no_inline_script_or_style(store, visitor):
    pairs(store, 1)
    boss = visitor("boss", Role.MANAGER)
    for path in ("/", "/p/p", "/manage", "/manage/p/p", "/manage/people", "/manage/log", "/login"):
        page = boss.get(path)
        assert page.status_code == 200
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "<script>" not in page.text
        assert " style=" not in page.text
        assert "<style" not in page.text
        assert " onclick" not in page.text
        assert "http://" not in page.text.replace("http://127.0.0.1", "")
        assert "https://" not in page.text


def test_the_service_says_that_it_is_there(app):
    assert Visitor(app).get("/health").text == "ok"


def test_a_locked_database_is_told_and_the_same_form_counts_once_it_is_free(tmp_path, clock):
    store = Store(tmp_path / "locked.db", clock=clock, busy_seconds=0.1)
    pairs(store, 1)
    person(store, "ann")
    ann = Visitor(create_app(store), "ann")
    form = ann.fields("/p/p") | {"choice": "tie"}
    other = sqlite3.connect(tmp_path / "locked.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    refused = ann.script("/p/p/vote", form)
    page = ann.http.post("/p/p/vote", data=form)  # without the script, a page says it
    other.execute("ROLLBACK")
    other.close()
    assert refused.status_code == page.status_code == 503
    assert "nothing was saved" in refused.json()["error"]
    assert "nothing was saved" in page.text
    assert not stored(store)
    assert ann.script("/p/p/vote", form).status_code == 200
    assert len(stored(store)) == 1
    store.close()
