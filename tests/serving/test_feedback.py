"""What is kept of an answer: with consent everything that feedback needs, without it nothing at all."""

from __future__ import annotations

import json
import os
import stat
import threading

import pytest
from sqlalchemy import select

from feedback.errors import InputError
from feedback.gathering import adjudicate, gather
from feedback.production import COMMENTS, PRODUCTION, open_production, pseudonym_of, read_key
from feedback.projects import create_project
from feedback.records import Item, Label, Project
from feedback.snapshot import SnapshotConfig, make_snapshot
from feedback.store import Store
from feedback.tables import metadata

from .conftest import HELLO

SECRET = [{"role": "user", "content": "my private words zebra"}]
AGREED = {"metadata": {"consent": "true"}}


def rate(server, answer, rating="up", **values):
    return server.http.post("/v1/feedback", json={"id": answer, "rating": rating, **values})


def spoken(server, count):
    """So many different answers with words in them; the toy often says nothing."""
    found = {}
    for seed in range(100):
        body = server.chat(SECRET, seed=seed, max_tokens=30, temperature=1.5, **AGREED).json()
        text = body["choices"][0]["message"]["content"].strip()
        if text:
            found[text] = body
        if len(found) == count:
            return list(found.values())
    raise AssertionError("the toy is silent")


def everything(store):
    """The whole database as text: every row of every table."""
    with store.read() as connection:
        return {
            table.name: [tuple(row) for row in connection.execute(select(table))]
            for table in metadata.sorted_tables
        }


def test_without_consent_nothing_is_kept_at_all(serve, store, recorder, tmp_path):
    before = everything(store)
    server = serve(recorder=recorder)
    replies = [
        server.chat(SECRET, user="ann the user"),
        server.chat(SECRET, metadata={"consent": "no"}),
        server.chat(SECRET, headers={"X-Feedback-Consent": "false"}),
    ]
    assert [reply.json()["feedback"] for reply in replies] == [{"stored": False}] * 3
    assert not any("feedback" in event for event in server.events(SECRET, user="ann the user"))
    for reply in replies:
        found = rate(server, reply.json()["id"], user="ann the user")
        assert (found.status_code, found.json()["error"]["code"]) == (404, "unknown_id")
    assert everything(store) == before
    raw = b"".join(path.read_bytes() for path in tmp_path.glob("feedback.db*"))
    assert b"zebra" not in raw
    assert b"ann the user" not in raw


def test_a_server_that_does_not_log_ignores_consent(serve, tmp_path):
    server = serve()
    body = server.chat(SECRET, **AGREED).json()
    assert body["feedback"] == {"stored": False}
    found = rate(server, body["id"])
    assert (found.status_code, found.json()["error"]["code"]) == (404, "logging_off")
    assert server.health()["logging"] == "off"


@pytest.mark.parametrize("how", [{"headers": {"X-Feedback-Consent": "true"}}, AGREED])
def test_with_consent_prompt_answer_version_and_decoding_are_kept(serve, store, recorder, how):
    server = serve(recorder=recorder)
    chat = [{"role": "system", "content": "be kind"}, *SECRET]
    body = server.chat(chat, temperature=0.5, top_p=0.9, seed=7, stop=["never"], **how).json()
    assert body["feedback"] == {"stored": True}
    (item,) = gather(store, PRODUCTION).items
    assert item.id == body["id"]
    assert [message.model_dump() for message in item.messages] == chat
    (response,) = item.responses
    assert response.text == body["choices"][0]["message"]["content"]
    assert response.policy == body["system_fingerprint"]
    assert response.decoding == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 0,
        "max_new_tokens": 16,
        "seed": 7,
        "stop": ["never"],
        "finish_reason": body["choices"][0]["finish_reason"],
    }


def test_a_streamed_answer_is_kept_before_its_end_and_each_choice_by_itself(serve, store, recorder):
    server = serve(recorder=recorder)
    events = server.events(SECRET, n=2, **AGREED)
    assert events[-1]["feedback"] == {"stored": True}
    name = events[0]["id"]
    found = gather(store, PRODUCTION)
    assert [item.id for item in found.items] == [name, f"{name}:1"]
    assert rate(server, name, "down", index=1, user="ann").status_code == 200
    assert [vote.item for vote in gather(store, PRODUCTION).votes] == [f"{name}:1"]


def test_ratings_become_votes_of_pseudonyms_that_later_ones_replace(serve, store, recorder):
    server = serve(recorder=recorder)
    name = server.chat(SECRET, **AGREED).json()["id"]
    assert rate(server, name, "up", user="ann@example.org").json()["replaced"] is False
    assert rate(server, name, "up", user="ann@example.org").json()["replaced"] is False  # sent twice
    assert rate(server, name, "down", user="bob").status_code == 200
    assert rate(server, name, "down", user="ann@example.org").json()["replaced"] is True
    found = gather(store, PRODUCTION)
    ann, bob = (pseudonym_of(user, b"k" * 32) for user in ("ann@example.org", "bob"))
    assert {vote.annotator: vote.value for vote in found.votes} == {
        ann: Label(good=False),
        bob: Label(good=False),
    }
    assert "example.org" not in json.dumps(everything(store), default=str)
    before = store.views()
    store.rebuild()
    assert store.views() == before  # the log tells it all


def test_comments_are_critiques_beside_the_votes(serve, store, recorder):
    server = serve(recorder=recorder)
    (body,) = spoken(server, 1)
    name = body["id"]
    assert rate(server, name, "down", user="ann", comment="too short").status_code == 200
    assert rate(server, name, "down", user="ann", comment="far too short").status_code == 200
    found = gather(store, COMMENTS)
    assert [vote.value.text for vote in found.votes] == ["far too short"]
    rows = make_snapshot(found, SnapshotConfig(license="CC0-1.0")).files["critiques.jsonl"]
    row = json.loads(rows)
    assert (row["critique"], row["prompt"]) == ("far too short", SECRET[0]["content"])
    assert "comments" not in "".join(item.id for item in gather(store, PRODUCTION).items)


def test_votes_come_out_of_a_snapshot_as_those_of_other_label_projects(serve, store, recorder):
    """Two answers to one prompt, one good and one bad, make a pair too."""
    server = serve(recorder=recorder)
    good, bad = spoken(server, 2)
    rate(server, good["id"], "up", user="ann")
    rate(server, bad["id"], "down", user="bob")
    files = make_snapshot(gather(store, PRODUCTION), SnapshotConfig(license="CC0-1.0")).files
    labels = {row["completion"]: row["label"] for row in map(json.loads, files["labels.jsonl"].splitlines())}
    texts = [body["choices"][0]["message"]["content"].replace("\x00", "") for body in (good, bad)]
    assert labels == {texts[0]: True, texts[1]: False}
    pair = json.loads(files["preferences.jsonl"])
    assert (pair["chosen"], pair["rejected"]) == tuple(texts)
    assert pair["policies"]["chosen"] == good["system_fingerprint"]


def test_ids_of_other_projects_and_of_nothing_are_unknown(serve, store, recorder):
    project = Project(id="tone", name="Tone", kind="label")
    item = Item(id="tone-1", project="tone", kind="label", messages=HELLO, responses=[{"text": "hi"}])
    create_project(store, "system", project, [item])
    server = serve(recorder=recorder)
    for name in ("tone-1", "chatcmpl-0"):
        found = rate(server, name)
        assert (found.status_code, found.json()["error"]["param"]) == (404, "id")
    assert gather(store, "tone").votes == ()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"rating": "up"}, "id"),
        ({"id": "x", "rating": "good"}, "rating"),
        ({"id": "x", "rating": "up", "comment": "y" * 5001}, "comment"),
        ({"id": "x", "rating": "up", "index": 8}, "index"),
        ({"id": "x", "rating": "up", "stars": 5}, "stars"),
    ],
)
def test_bad_ratings_name_the_key(server, body, param):
    reply = server.http.post("/v1/feedback", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_a_rating_that_an_adjudicator_settled_stays(serve, store, recorder):
    server = serve(recorder=recorder)
    name = server.chat(SECRET, **AGREED).json()["id"]
    rate(server, name, "up", user="ann")
    (item,) = gather(store, PRODUCTION).items
    adjudicate(store, "judge", PRODUCTION, item, Label(good=True))
    reply = rate(server, name, "down", user="ann")
    assert reply.status_code == 409
    assert "adjudicator" in reply.json()["error"]["message"]


def test_many_users_at_once_lose_and_double_nothing(serve, store, recorder):
    server = serve(recorder=recorder)
    name = server.chat(SECRET, **AGREED).json()["id"]
    threads = [
        threading.Thread(target=rate, args=(server, name), kwargs={"user": str(n % 6)}) for n in range(24)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    votes = gather(store, PRODUCTION).votes
    assert {vote.annotator for vote in votes} == {pseudonym_of(str(n), b"k" * 32) for n in range(6)}
    assert len(votes) == 6


def test_a_store_that_fails_costs_the_record_and_not_the_answer(serve, store, recorder, caplog):
    server = serve(recorder=recorder)
    with store.write() as connection:
        connection.exec_driver_sql("DROP TABLE items")
    reply = server.chat(SECRET, **AGREED)
    assert (reply.status_code, reply.json()["feedback"]) == (200, {"stored": False})
    assert "was not kept" in caplog.text
    assert "zebra" not in caplog.text
    assert rate(server, reply.json()["id"]).status_code == 503


def test_a_project_of_that_name_and_another_kind_is_told(tmp_path):
    store = Store(tmp_path / "other.db")
    create_project(store, "system", Project(id=PRODUCTION, name="Mine", kind="pairwise"))
    with pytest.raises(InputError, match="'production' is of kind pairwise"):
        open_production(store)
    store.close()


def test_the_key_of_pseudonyms_is_made_once_and_read_by_its_owner_alone(tmp_path):
    path = tmp_path / "feedback" / "users.key"
    keys = []
    threads = [threading.Thread(target=lambda: keys.append(read_key(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(keys)) == 1
    assert len(keys[0]) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["users.key"]
    assert pseudonym_of("ann", keys[0]) != pseudonym_of("ann", b"another key of the same length..")
    path.write_text("short")
    with pytest.raises(InputError, match="holds no key"):
        read_key(path)
