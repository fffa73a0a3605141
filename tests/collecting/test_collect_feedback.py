"""The flows on a real Prefect server: a queue that is filled once, an event that is sent once."""

from __future__ import annotations

import functools
import shutil
import threading
import zlib
from dataclasses import replace
from datetime import timedelta

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter
from prefect.testing.utilities import prefect_test_harness

from feedback import accounts, assignment
from feedback import watching as log
from feedback.formats.jsonl import read_items
from feedback.gathering import gather
from feedback.loading import add_imported
from feedback.projects import create_project
from feedback.records import Choice, Project
from feedback.store import Store
from flows import collect_feedback as command
from flows import collecting as deployments
from flows import deploy
from flows.collect_feedback import collect_feedback
from flows.watch_feedback import watch_feedback
from rlhf_core.config import change_params
from rlhf_core.data.split import split_of
from rlhf_core.errors import InputError
from tasks import asking, collecting, collections, watching
from tasks.events import FEEDBACK_READY

from .registered import NAME, make_workspace, register
from .reward_models import make_reward_model


class Clock:
    """Real time, and what a test has let pass by."""

    def __init__(self):
        self.gone = timedelta()

    def __call__(self):
        from datetime import UTC, datetime

        return datetime.now(UTC) + self.gone

    def pass_by(self, **time):
        self.gone += timedelta(**time)


@pytest.fixture(scope="module")
def server():
    with prefect_test_harness(server_startup_timeout=180), get_client(sync_client=True) as client:
        yield client


@pytest.fixture(scope="module")
def made(root, tiny_model_dir, tmp_path_factory):
    """A workspace with one version, which is candidate and champion."""
    base = tmp_path_factory.mktemp("collecting")
    reward = make_reward_model(tiny_model_dir, base / "reward")
    tags = make_workspace(base / "home", root, tiny_model_dir, reward)
    register(base / "home", tags, tiny_model_dir, "candidate", "champion")
    return base / "home", tags


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(asking, "Store", functools.partial(Store, clock=found))
    return found


@pytest.fixture
def home(made, server, clock, tmp_path, monkeypatch, request):
    for name in ("MLFLOW_TRACKING_URI", asking.DATABASE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    place = tmp_path / "home"
    shutil.copytree(made[0], place, symlinks=True)
    # All tests share a server, so each gets ids of its own.
    change_params(place / "params.yaml", {"run.seed": zlib.crc32(request.node.name.encode())})
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def store(home, clock):
    opened = Store(asking.database(home), clock=clock)
    yield opened
    opened.close()


def events(server, project):
    """Those of a collection's end, as automations see them."""
    about = EventResourceFilter(id=[f"rlhf.feedback.{project}"])
    wanted = EventFilter(event=EventNameFilter(name=[FEEDBACK_READY]), resource=about)
    return server.read_events(wanted, limit=50).events


def artifacts(server, project):
    wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[f"feedback-{project}"]))
    return server.read_artifacts(artifact_filter=wanted)


def vote(store, project, name="ann", times=1):
    people = {person.name: person for person in accounts.list_annotators(store)}
    who = people.get(name) or accounts.add_annotator(store, "system", name)[0]
    for _ in range(times):
        shown = assignment.next_item(store, who, project)
        value = Choice(choice="a", strength=1)
        assignment.cast_vote(store, who, shown.item.id, f"{shown.item.id}-{name}", value, 2.0)


def dying(*arguments, **options):
    raise KeyboardInterrupt


def test_a_collection_is_asked_shown_and_told_of_once(home, server, store):
    project = collect_feedback(overrides=["collect.votes_wanted=3", "collect.overlap_share=0.0"])
    found = gather(store, project)
    assert len(found.items) == 4
    for item in found.items:
        assert {response.policy for response in item.responses} == {
            f"{NAME}/1"
        }  # twice the same, sampled twice
        assert item.responses[0].text != item.responses[1].text
        assert NAME not in item.id
    (shown,) = artifacts(server, project)
    assert (shown.data, "0 of 3" in shown.description) == (0.0, True)
    assert "| asked | 4 of 4 prompts |" in shown.description
    assert "| to learn from | 3, drawn at random |" in shown.description
    assert "| held out, to measure by | 1, drawn at random |" in shown.description
    vote(store, project)
    assert watch_feedback() == "votes are waited for"
    assert events(server, project) == []
    vote(store, project, times=2)
    assert watch_feedback() == "nothing is waited for"
    watch_feedback()
    (event,) = events(server, project)
    assert event.payload == {"project": project, "votes": 3, "reason": "votes"}
    (shown,) = artifacts(server, project)  # one, changed in place
    assert shown.data == 100.0
    assert "ended" in shown.description
    assert "ann" not in shown.description.replace("annotator", "")  # ids alone


@pytest.mark.slow
def test_who_asks_the_same_again_gets_the_open_collection_and_later_other_prompts(home, store):
    first = collect_feedback(size=6)
    assert collect_feedback(size=6) == first
    assert len(gather(store, first).items) == 6
    log.close_collection(store, "manager", first)
    second = collect_feedback(size=6)
    assert second != first
    asked = [{item.prompt for item in gather(store, name).items} for name in (first, second)]
    assert len(asked[1]) == 6
    assert not asked[0] & asked[1]
    other = collect_feedback(size=5, overrides=["collect.ask_again=true"])
    assert {item.prompt for item in gather(store, other).items} & (asked[0] | asked[1])


@pytest.mark.parametrize("place", ["before the queue is filled", "after it"])
def test_killed_and_begun_again_it_is_taken_up(home, server, store, monkeypatch, place):
    answered = []
    real = collecting._run_answers
    monkeypatch.setattr(collecting, "_run_answers", lambda *a: (answered.append(1), real(*a)))
    with monkeypatch.context() as broken:
        if place == "after it":
            broken.setattr(watching, "look_at", dying)
        else:
            broken.setattr(collecting, "fill_queue", dying)
        with pytest.raises(KeyboardInterrupt):
            collect_feedback()
    assert len(log.list_collections(store)) == (place == "after it")
    left = home / ".rlhf" / "collections" / "collect-other" / "models"  # as SIGKILL leaves them
    left.mkdir(parents=True)
    project = collect_feedback()
    assert len(answered) == 1  # what was made is kept
    assert [one.id for one in log.list_collections(store)] == [project]
    assert len(gather(store, project).items) == 4
    assert len(artifacts(server, project)) == 1
    assert not left.exists()
    assert not (home / ".rlhf" / "collections" / project).exists()


def test_two_watchers_at_once_send_one_event(home, server, store):
    project = collect_feedback(overrides=["collect.votes_wanted=1"])
    vote(store, project)
    start = threading.Barrier(2)

    def watch():
        start.wait()
        watching.look(home, print)

    threads = [threading.Thread(target=watch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [event.payload["reason"] for event in events(server, project)] == ["votes"]
    kinds = [event.type for event in store.events()]
    assert [kinds.count(f"collection_{word}") for word in ("ended", "claimed", "announced")] == [1, 1, 1]


@pytest.mark.parametrize("step", ["send", pytest.param("note_announced", marks=pytest.mark.slow)])
def test_a_watcher_that_dies_while_it_tells_is_followed_and_one_event_is_sent(
    home, server, store, clock, monkeypatch, step
):
    project = collect_feedback(overrides=["collect.votes_wanted=1"])
    vote(store, project)
    sent = []
    real = watching.send
    monkeypatch.setattr(watching, "send", lambda *a: (sent.append(1), real(*a)))
    with monkeypatch.context() as broken:
        broken.setattr(watching, step, dying)
        with pytest.raises(KeyboardInterrupt):
            watching.look(home, print)
    assert watching.look(home, print)  # the claim of the dead one still holds
    assert len(events(server, project)) == (step == "note_announced")
    clock.pass_by(seconds=log.CLAIM_SECONDS)
    assert not watching.look(home, print)
    assert len(events(server, project)) == 1
    assert len(sent) == 1
    assert log.find_collection(store, project).announced


@pytest.mark.slow
def test_a_server_that_loses_the_event_gets_it_again(home, server, store, clock, monkeypatch):
    project = collect_feedback(overrides=["collect.votes_wanted=1"])
    vote(store, project)
    monkeypatch.setattr(watching, "CONFIRM_SECONDS", 0.0)
    said = []
    with monkeypatch.context() as broken:
        broken.setattr(watching, "send", lambda *arguments: None)
        assert watching.look(home, said.append)
    assert "has not taken the event" in said[-1]
    clock.pass_by(seconds=log.CLAIM_SECONDS)
    monkeypatch.setattr(watching, "CONFIRM_SECONDS", 60.0)
    assert not watching.look(home, said.append)
    assert len(events(server, project)) == 1


def test_an_event_is_that_of_one_collection_of_one_store():
    at = Clock()()
    one = log.Watched("collect-x", at, wanted=1, deadline=None)
    later = log.Watched("collect-x", at + timedelta(seconds=1), wanted=1, deadline=None)
    assert watching.event_id(one) == watching.event_id(replace(one, ended=at, claimed=at))
    assert watching.event_id(one) != watching.event_id(later)


def test_the_deadline_closes_it_and_says_that_nobody_voted(home, server, store, clock):
    project = collect_feedback(overrides=["collect.deadline_hours=2"])
    clock.pass_by(hours=1, minutes=59)
    said = []
    assert watching.look(home, said.append)
    clock.pass_by(minutes=1)
    assert not watching.look(home, said.append)
    assert f"{project}: no votes at the deadline; closed" in said
    (event,) = events(server, project)
    assert event.payload == {"project": project, "votes": 0, "reason": "deadline"}


@pytest.mark.slow
def test_production_prompts_of_the_evaluations_side_are_held_out_like_others(home, store, tmp_path, params):
    texts = [f"can you tell me about place {i}, please?" for i in range(20)]
    rows = [f'{{"prompt": "{text}", "responses": ["yes"]}}' for text in texts]
    (tmp_path / "used.jsonl").write_text("\n".join(rows))
    project = Project(id="production", name="Use", kind="label", gold_share=0.0)
    create_project(store, "system", project)
    add_imported(store, "system", project, read_items(tmp_path / "used.jsonl", project))
    held_in = {text for text in texts if split_of(text, params.data.eval_fraction) == "train"}
    assert 0 < len(held_in) < 20
    off = ["collect.held_out_share=0", "collect.ask_again=true"]
    asked = collect_feedback(size=20, choose="production", overrides=off)
    assert {item.prompt for item in gather(store, asked).items} <= held_in
    assert len(gather(store, asked).items) >= len(held_in) - 2  # but for those answered twice the same
    share = ["collect.held_out_share=0.5", "collect.ask_again=true"]
    asked = collect_feedback(size=4, choose="production", overrides=share)
    sides = [item.prompt in held_in for item in gather(store, asked).items]
    assert (sides.count(True), sides.count(False)) == (2, 2)


@pytest.mark.slow
def test_two_policies_and_their_reward_model(home, made, store, tiny_model_dir):
    register(home, made[1], tiny_model_dir, "candidate")
    with pytest.raises(InputError, match="there is no version 9"):
        collect_feedback(overrides=["collect.first=9"])
    # Both have the same weights and, where disagreement is sought, the same random numbers.
    with pytest.raises(InputError, match="answers that are the same"):
        collect_feedback(choose="disagreement")
    project = collect_feedback(choose="uncertain", overrides=["collect.first=candidate", "collect.samples=3"])
    found = gather(store, project)
    assert str(found.project.kind) == "ranking"
    assert {response.policy for item in found.items for response in item.responses} == {f"{NAME}/2"}
    (about,) = (one.about for one in log.list_collections(store))
    assert about["how"] == "least gap of scores of one reward model"


def test_without_a_champion_the_sft_model_answers(home, store):
    from rlhf_core.mlflow_writer import open_client

    open_client(home).delete_registered_model_alias(NAME, "champion")
    params = change_params(home / "params.yaml", {"collect.samples": 2})
    first, second, _ = asking.policies(home, params)
    assert (first.label, first.version, second.label) == (f"{NAME}-sft/1", "", f"{NAME}/1")
    assert first.md5


def test_where_nothing_can_differ_disagreement_is_refused(home):
    with pytest.raises(InputError, match=r"are both rlhf-policy/1, so nothing can differ"):
        collect_feedback(choose="disagreement")


@pytest.mark.slow
def test_the_schedule_is_on_only_while_a_collection_is_open(home, server, store):
    deploy.make_pool()
    deployments.deploy_all(home)

    def is_on():
        watch = server.read_deployment_by_name(f"{watching.WATCH}/{watching.WATCH}")
        (schedule,) = server.read_deployment_schedules(watch.id)
        assert schedule.schedule.interval == timedelta(seconds=120)
        return schedule.active

    assert not is_on()
    project = collect_feedback(overrides=["collect.votes_wanted=1"])
    assert is_on()
    deployments.deploy_all(home)  # a restart of everything
    assert is_on()
    watch_feedback()
    assert is_on()
    vote(store, project)
    watch_feedback()
    assert not is_on()


def test_collections_are_listed_and_closed(home, store, capsys, monkeypatch):
    project = collect_feedback(overrides=["collect.votes_wanted=2"])
    vote(store, project)
    collections.list_all(home)
    said = capsys.readouterr().out
    assert said.startswith(f"{project}  open  1 of 2 votes  until 20")
    assert said.endswith(f"  random  {NAME}/1\n")
    collections.close(home, project)
    assert "closed with 1 of 2 votes" in capsys.readouterr().out
    collections.close(home, project)
    assert "has ended already (closed)" in capsys.readouterr().out
    with pytest.raises(InputError, match="there is no collection 'x'"):
        collections.close(home, "x")


def test_from_a_shell(home, store, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["rlhf collect", "--size", "3", "-S", "collect.overlap_share=0.0"])
    command.main()
    (found,) = log.list_collections(store)
    assert f"{found.id}: waits for 3 votes until {watching.moment(found.deadline)}" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["rlhf collect", "--size", "3", "-S", "collect.votes_wanted=10"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == InputError.exit_code
    assert "collect.votes_wanted (10) must not exceed the 9 votes" in capsys.readouterr().err


@pytest.mark.slow
def test_looks_that_were_missed_are_not_made_up_for(home, server):
    from prefect.states import Scheduled

    deploy.make_pool()
    deployments.deploy_all(home)
    watch = server.read_deployment_by_name(f"{watching.WATCH}/{watching.WATCH}")
    now = Clock()()
    early, late = (
        server.create_flow_run_from_deployment(
            watch.id, state=Scheduled(scheduled_time=now + timedelta(minutes=m))
        )
        for m in (-30, 30)
    )
    assert watching.skip_missed(watch.id) >= 1
    left = {run.id for run in server.read_flow_runs()}
    assert early.id not in left
    assert late.id in left
