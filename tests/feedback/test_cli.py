"""`rlhf feedback`: what people type, and doors that stay shut."""

from __future__ import annotations

import json
import stat

import pytest
from typer.testing import CliRunner

from feedback import cli
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
