"""`rlhf feedback`: what people type, and doors that stay shut."""

from __future__ import annotations

import json
import stat

import pytest
from typer.testing import CliRunner

from feedback import cli
from feedback.accounts import find_by_name
from feedback.errors import ConflictError, InputError
from feedback.formats.jsonl import read_collection
from feedback.gathering import gather
from feedback.records import Role
from feedback.store import Store

from .conftest import person
from .serving import Serving


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    found = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


def rows(path, count=3):
    path.write_text(
        "".join(json.dumps({"prompt": f"q{n}", "responses": ["a", "b"]}) + "\n" for n in range(count))
    )
    return str(path)


def test_a_project_from_file_to_export(here):
    assert run("create-project", "p", "--kind", "pairwise", "--file", rows(here / "q.jsonl")) == (
        "project p: 3 items\n"
    )
    (here / "more.jsonl").write_text(json.dumps({"prompt": "another", "responses": ["a", "b"]}))
    assert "1 items and 0 votes more" in run("import", "p", "more.jsonl")
    assert "0 items and 0 votes more" in run("import", "p", "more.jsonl")
    assert "votes 0 of 4" in run("status")
    assert "annotator" in run("add-annotator", "Ann")
    assert "4 items, 0 votes" in run("export", "p", "out/p.jsonl")
    assert read_collection(here / "out" / "p.jsonl").items == gather(Store(cli.DATABASE), "p").items
    assert run("rebuild").endswith("events\n")


@pytest.mark.parametrize("form", ["label-studio", "argilla"])
def test_votes_go_out_and_come_back_in_the_forms_of_others(here, form):
    run("create-project", "p", "--kind", "pairwise", "--file", rows(here / "q.jsonl"))
    store = Store(cli.DATABASE)
    ann = person(store, "Ann")
    from feedback import assignment
    from feedback.records import Choice

    for key, choice in (("k1", Choice(choice="tie")), ("k2", Choice(choice="b", strength=2))):
        shown = assignment.next_item(store, ann, "p")
        assignment.cast_vote(store, ann, shown.item.id, key, choice, 3.0)
    run("export", "p", "p.json", "--format", form)
    other = str(here / "other.db")
    run("create-project", "p", "--kind", "pairwise", "--file", rows(here / "q.jsonl"), "--database", other)
    assert "0 items and 2 votes more" in run("import", "p", "p.json", "--format", form, "--database", other)
    assert "0 items and 0 votes more" in run("import", "p", "p.json", "--format", form, "--database", other)
    came = sorted((vote.item, vote.value.choice) for vote in gather(Store(other), "p").votes)
    assert came == sorted((vote.item, vote.value.choice) for vote in gather(store, "p").votes)


def vote_all(store, name, *values):
    from feedback import assignment

    who = person(store, name)
    for number, value in enumerate(values):
        shown = assignment.next_item(store, who, "p")
        assignment.cast_vote(store, who, shown.item.id, f"{name}-{number}", value, 3.0)


def exported(*arguments):
    run("export", "p", "out.jsonl", *arguments)
    with open("out.jsonl") as file:
        return [json.loads(line) for line in file]


def test_rows_hold_what_training_takes_by_hand(here):
    from feedback.records import Choice

    answers = [
        {"text": "a", "policy": "sft@3", "decoding": {"temperature": 0.7}},
        {"text": "b", "policy": "ppo@4", "decoding": {}},
    ]
    items = [{"prompt": f"q{n}", "responses": answers} for n in range(2)]
    (here / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in items))
    overlap = ("--overlap-votes", "3", "--overlap-share", "1")
    run("create-project", "p", "--kind", "pairwise", "--file", "q.jsonl", *overlap)
    store, b, tie = Store(cli.DATABASE), Choice(choice="b", strength=3), Choice(choice="tie")
    vote_all(store, "Ann", b, tie)
    vote_all(store, "Bob", b, tie)
    vote_all(store, "Cem", Choice(choice="a", strength=1), Choice(choice="a", strength=2))
    by_prompt = {row["prompt"]: row for row in exported("--format", "rows", "--ties", "soften")}
    first, second = by_prompt["q0"], by_prompt["q1"]
    assert (first["chosen"], first["rejected"]) == ("b", "a")
    assert first["margin"] == round((3 + 3 - 1) / 3, 6)
    assert first["probability"] == round(2 / 3, 6)
    assert first["votes"] == {"chosen": 2, "rejected": 1, "tie": 0, "bad": 0}
    assert first["policies"] == {"chosen": "ppo@4", "rejected": "sft@3"}
    assert first["decoding"] == {"chosen": {}, "rejected": {"temperature": 0.7}}
    assert len(first["annotators"]) == 3
    assert (second["chosen"], second["probability"]) == ("a", round((1 + 0.5 + 0.5) / 3, 6))
    assert [row["prompt"] for row in exported("--format", "rows", "--ties", "drop")] == ["q0"]
    assert "1 rows of 2 items, 6 votes" in run(
        "export", "p", "out.jsonl", "--format", "rows", "--ties", "drop"
    )
    (plain,) = exported("--format", "trl")
    assert plain == {
        "prompt": [{"role": "user", "content": "q0"}],
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "a"}],
        "margin": round(5 / 3, 6),
    }


@pytest.mark.parametrize(
    ("kind", "value", "row", "trl"),
    [
        ("label", {"kind": "label", "good": False}, {"label": False}, {"label": False}),
        ("critique", {"kind": "critique", "text": "cold"}, {"critique": "cold"}, None),
        (
            "correction",
            {"kind": "correction", "text": "Hello!"},
            {"response": "Hello!"},
            {"completion": [{"role": "assistant", "content": "Hello!"}]},
        ),
    ],
)
def test_each_kind_goes_out_as_the_rows_that_it_gives(here, kind, value, row, trl):
    from pydantic import TypeAdapter

    from feedback.records import Value

    (here / "q.jsonl").write_text(json.dumps({"prompt": "Hi?", "responses": ["k"]}))
    run("create-project", "p", "--kind", kind, "--file", "q.jsonl")
    vote_all(Store(cli.DATABASE), "Ann", TypeAdapter(Value).validate_python(value))
    (found,) = exported("--format", "rows")
    assert row.items() <= found.items()
    if trl is None:
        with pytest.raises(InputError, match="no form for critiques"):
            exported("--format", "trl")
    else:
        (found,) = exported("--format", "trl")
        assert trl.items() <= found.items()


def test_a_person_is_erased_by_name_after_a_question(here):
    run("create-project", "p", "--kind", "pairwise", "--file", rows(here / "q.jsonl"))
    run("add-annotator", "Ann")
    run("add-annotator", "Boss", "--role", "manager")
    with pytest.raises(InputError, match="nobody called 'Anne'"):
        run("erase", "Anne", "--yes")
    refused = CliRunner().invoke(cli.app, ["erase", "Ann"], input="n\n")
    assert refused.exit_code == 1
    store = Store(cli.DATABASE)
    assert find_by_name(store, "Ann") is not None
    assert "Ann: deleted; 1 entries" in run("erase", "Ann", "--yes")
    assert find_by_name(store, "Ann") is None
    with pytest.raises(ConflictError, match="only active manager"):
        run("erase", "Boss", "--yes")
    events = len(store.events())
    assert run("rebuild") == f"{events} events\n"


def test_errors_name_file_line_and_rule(here):
    (here / "q.jsonl").write_text('{"prompt": "x", "responses": ["a", "b"]}\n{"prompt": "x"}\n')
    with pytest.raises(InputError, match=r"q\.jsonl: line 2.*2 responses, found 0"):
        run("create-project", "p", "--kind", "pairwise", "--file", "q.jsonl")
    with pytest.raises(InputError, match="a rating project has some"):
        run("create-project", "p", "--kind", "rating", "--file", "q.jsonl")
    assert run("status") == ""
    run("add-annotator", "Ann")
    with pytest.raises(ConflictError, match="'Ann' is taken"):
        run("add-annotator", "Ann")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_other_machines_come_in_only_with_accounts(store, host):
    with pytest.raises(InputError, match="needs accounts"):
        cli.refuse_open_doors(store, host, no_login=False)
    person(store, "ann")  # an annotator alone could not manage
    with pytest.raises(InputError, match="needs accounts"):
        cli.refuse_open_doors(store, host, no_login=False)
    person(store, "boss", Role.MANAGER)
    cli.refuse_open_doors(store, host, no_login=False)
    with pytest.raises(InputError, match="loopback alone"):
        cli.refuse_open_doors(store, host, no_login=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_this_machine_may_go_without(store, host):
    cli.refuse_open_doors(store, host, no_login=True)


def test_serving_the_first_time_makes_a_manager_whose_token_its_owner_alone_reads(tmp_path):
    service = Serving(tmp_path)
    try:
        path = tmp_path / ".rlhf" / "feedback" / "manager.token"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        import httpx

        form = {"name": "manager", "secret": path.read_text().strip()}
        answer = httpx.post(f"{service.url}/login", data=form)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
    finally:
        service.stop()


def test_serving_without_sign_in_lets_one_vote_at_once(tmp_path):
    import httpx

    service = Serving(tmp_path, "--no-login")
    try:
        assert httpx.get(f"{service.url}/manage").status_code == 200
        assert httpx.get(f"{service.url}/manage", headers={"Host": "evil.example"}).status_code == 400
        assert httpx.post(f"{service.url}/manage/people", data={"name": "x"}).status_code == 403
    finally:
        service.stop()
