"""Simulated annotators at the real pages: they read what is shown, and their votes mean what they meant."""

from __future__ import annotations

import httpx
import pytest

from feedback import accounts
from feedback.gathering import gather
from feedback.projects import create_project
from feedback.records import Item, Project
from feedback.simulate import SimulatedAnnotator
from feedback.visiting import Visitor, read_page

ASK = [{"role": "user", "content": "Which *one* is <b>best</b>?"}]
TEXTS = {
    "pairwise": ["good", "bad"],
    "ranking": ["middling", "good", "bad"],
    "label": ["bad"],
    "rating": ["good"],
}
WORTH = {"good": 1.0, "middling": 0.5, "bad": 0.0}


def project_of(store, kind, count=6):
    criteria = ("tone", "truth") if kind == "rating" else ()
    project = Project(id="p", name="P", kind=kind, criteria=criteria, gold_share=0.0)
    items = [
        Item(
            id=f"i{n}",
            project="p",
            kind=kind,
            messages=[{"role": "user", "content": f"question {n}"}],
            responses=[{"text": text, "policy": text} for text in TEXTS.get(kind, ["bad"])],
        )
        for n in range(count)
    ]
    create_project(store, "system", project, items)


def come(app, store, **options):
    from starlette.testclient import TestClient

    accounts.add_annotator(store, "system", "sim", secret="a long secret")
    person = SimulatedAnnotator(
        id="sim",
        gold=lambda item: [WORTH[response.text] for response in item.responses],
        criteria=("tone", "truth"),
        write=lambda item: f"better than {item.responses[0].text}",
        **options,
    )
    http = TestClient(app, base_url="http://127.0.0.1", follow_redirects=False)
    return Visitor("http://127.0.0.1", "sim", "a long secret", person, http)


@pytest.mark.parametrize("kind", ["pairwise", "ranking", "rating", "label", "critique", "correction"])
def test_votes_are_those_of_somebody_who_knows_what_is_good(app, store, kind):
    project_of(store, kind)
    assert come(app, store).vote_on_all("p") == 6
    found = gather(store, "p")
    assert len(found.votes) == 6
    for vote in found.votes:
        value = vote.value
        if kind == "pairwise":
            assert (value.choice, value.strength) == ("a", 3), "response a is the good one, whatever its side"
        elif kind == "ranking":
            assert value.ranks == (2, 1, 3)
        elif kind == "rating":
            assert value.ratings == {"tone": 5, "truth": 5}
        elif kind == "label":
            assert value.good is False
        else:
            assert value.text == "better than bad"
    if kind in ("pairwise", "ranking"):
        assert len({vote.sides for vote in found.votes}) > 1, "sides differ, or the test could not tell"


def test_somebody_who_always_takes_the_first_takes_the_side_and_not_the_answer(app, store):
    project_of(store, "pairwise", 12)
    come(app, store, position_bias=1.0).vote_on_all("p")
    votes = gather(store, "p").votes
    assert all("ab".index(vote.value.choice) == vote.sides[0] for vote in votes)
    assert {vote.value.choice for vote in votes} == {"a", "b"}


def test_a_page_is_read_as_it_is_shown(app, store):
    project = Project(id="p", name="P", kind="pairwise")
    texts = ["one *fine*\n\n- day & <i>night</i>", "two"]
    responses = [{"text": text} for text in texts]
    rows = [Item(id="i", project="p", kind="pairwise", messages=ASK, responses=responses)]
    create_project(store, "system", project, rows)
    visitor = come(app, store)
    page = read_page(visitor._ask("GET", "/p/p").text)
    assert sorted(page.answers) == ["one fine day & <i>night</i>", "two"]
    assert page.prompt == [("user", "Which one is <b>best</b>?")]
    assert page.kind == "pairwise"
    assert page.fields["item"] == "i"
    assert read_page("<p>nothing</p>") is None


def test_an_answer_that_got_lost_is_asked_for_again_and_the_vote_counts_once(app, store, monkeypatch):
    monkeypatch.setattr("feedback.visiting.SECONDS_BETWEEN_TRIES", 0.0)
    project_of(store, "pairwise", 2)
    visitor = come(app, store)
    real, calls = visitor._http.request, []

    def lossy(method, path, **options):
        calls.append(path)
        answer = real(method, path, **options)
        if len(calls) % 2:
            raise httpx.ReadError("connection reset after the server had it")
        return answer

    monkeypatch.setattr(visitor._http, "request", lossy)
    assert visitor.vote_on_all("p") == 2
    assert len(gather(store, "p").votes) == 2


def test_wrong_secret_and_refused_votes_are_told(app, store):
    project_of(store, "pairwise", 1)
    visitor = come(app, store)
    with pytest.raises(ValueError, match="cannot sign in"):
        Visitor("", "sim", "not the secret", visitor.person, visitor._http)
