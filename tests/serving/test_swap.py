"""Versions come and go by alias; no request is lost, cut, or answered by two of them."""

from __future__ import annotations

import gc
import shutil
import threading
import time
import weakref

import pytest

from rlhf_core.config import SamplingConfig
from rlhf_core.errors import InputError, RLHFError
from rlhf_core.generation import generate
from rlhf_core.mlflow_writer import experiment_id, open_client
from rlhf_core.modeling.loading import load_policy
from serving.fleet import CHALLENGER, CHAMPION, Fleet
from serving.models import Version
from serving.registry import DirectorySource, RegistrySource
from serving.watch import MOST_MODELS, Watcher

from .conftest import CAPACITY, HELLO, RUN, until

NAME = "toy-policy"


@pytest.fixture(scope="session")
def tables(tmp_path_factory):
    """The tables of MLflow's store, made once."""
    root = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        open_client(root)
    return root


class Registry:
    def __init__(self, root):
        self.root, self.client = root, open_client(root)
        self.run = self.client.create_run(experiment_id(self.client, root)).info.run_id
        self.client.create_registered_model(NAME)

    def register(self, directory):
        number = len(self.client.search_model_versions(f"name='{NAME}'")) + 1
        source = self.root / "versions" / str(number)
        shutil.copytree(directory, source / "artifacts" / "policy")
        return self.client.create_model_version(NAME, f"file://{source}", run_id=self.run).version

    def point(self, alias, version):
        self.client.set_registered_model_alias(NAME, alias, str(version))

    def source(self, challenger=""):
        return RegistrySource(self.root, NAME, challenger, RUN, CAPACITY)


@pytest.fixture
def registry(tables, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "home"
    shutil.copytree(tables, root)
    return Registry(root)


@pytest.fixture
def two_versions(registry, tiny_model_dir, other_model_dir):
    registry.register(tiny_model_dir)
    registry.register(other_model_dir)
    registry.point("champion", 1)
    return registry


def text_of(directory, seed, tokens):
    sampling = SamplingConfig(temperature=0.7, top_k=0, top_p=1.0, max_new_tokens=tokens, seed=seed)
    model, tokenizer = load_policy(directory, RUN)
    return generate(model, tokenizer, [HELLO], sampling)[0][0].text


def test_under_load_the_alias_moves_and_every_request_is_answered_whole_by_one_version(
    two_versions, serve, tiny_model_dir, other_model_dir
):
    """Each answer must be, word for word, that of the version it names."""
    server = serve(two_versions.source(), interval=0.1)
    texts = {
        f"{NAME}/{number}": {seed: text_of(directory, seed, 40) for seed in range(4)}
        for number, directory in (("1", tiny_model_dir), ("2", other_model_dir))
    }
    assert texts[f"{NAME}/1"] != texts[f"{NAME}/2"]
    stop, found, faults, most = threading.Event(), [], [], []

    def ask(seed):
        import httpx

        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not stop.is_set():
                body = {"messages": HELLO, "seed": seed, "max_tokens": 40}
                try:
                    reply = client.post("/v1/chat/completions", json=body)
                    assert reply.status_code == 200, reply.text
                    answer = reply.json()
                    text = answer["choices"][0]["message"]["content"]
                    assert reply.headers["x-model-version"] == answer["system_fingerprint"]
                    assert text == texts[answer["system_fingerprint"]][seed]
                    found.append(answer["system_fingerprint"])
                except Exception as error:
                    faults.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for number in ("2", "1", "2", "1", "2"):
        two_versions.point("champion", number)
        until(lambda: server.fleet.role(CHAMPION).version.number == number)  # noqa: B023
        answered = len(found)
        until(lambda: most.append(server.fleet.count_loaded()) or len(found) > answered + 12)  # noqa: B023
    stop.set()
    for thread in threads:
        thread.join()
    assert faults == []
    assert set(found) == set(texts)
    assert max(most) <= MOST_MODELS
    until(lambda: server.fleet.count_loaded() == 1)


def test_a_request_in_flight_ends_on_the_version_it_began_with(
    two_versions, serve, tiny_model_dir, monkeypatch
):
    from .test_api import slow

    slow(monkeypatch)
    server = serve(two_versions.source())
    wanted = text_of(tiny_model_dir, 2, 150)
    found = []
    thread = threading.Thread(target=lambda: found.append(server.chat(seed=2, max_tokens=150)))
    thread.start()
    until(lambda: server.fleet.in_flight == 1)
    first = weakref.ref(server.fleet.role(CHAMPION))
    two_versions.point("champion", 2)
    until(lambda: server.fleet.role(CHAMPION).version.number == "2")
    assert server.chat().json()["system_fingerprint"] == f"{NAME}/2"
    assert thread.is_alive()
    state = {one["version"]: one for one in server.health()["versions"]}
    assert (state[f"{NAME}/1"]["roles"], state[f"{NAME}/1"]["in_flight"]) == ([], 1)
    thread.join()
    assert found[0].json()["choices"][0]["message"]["content"] == wanted
    assert found[0].json()["system_fingerprint"] == f"{NAME}/1"
    until(lambda: server.fleet.count_loaded() == 1)
    until(lambda: gc.collect() >= 0 and first() is None)  # its memory is free


def test_a_version_that_does_not_load_leaves_the_old_one_and_is_told_of(two_versions, serve, caplog):
    registry = two_versions
    server = serve(registry.source())
    weights = registry.root / "versions" / "2" / "artifacts" / "policy" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    registry.point("champion", 2)
    until(lambda: server.health()["not_loaded"])
    assert list(server.health()["not_loaded"]) == [f"{NAME}/2"]
    assert server.chat().json()["system_fingerprint"] == f"{NAME}/1"
    assert f"{NAME}/2 does not load, {NAME}/1 stays champion" in caplog.text
    weights.write_bytes(whole)  # it is tried again
    until(lambda: server.fleet.role(CHAMPION).version.number == "2")
    assert server.health()["not_loaded"] == {}
    assert server.chat().json()["system_fingerprint"] == f"{NAME}/2"


def test_weights_that_compute_nothing_finite_are_not_taken(two_versions, serve):
    from safetensors.torch import load_file, save_file

    path = two_versions.root / "versions" / "2" / "artifacts" / "policy" / "model.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, path, metadata={"format": "pt"})
    server = serve(two_versions.source())
    two_versions.point("champion", 2)
    until(lambda: server.health()["not_loaded"])
    assert "not finite" in server.health()["not_loaded"][f"{NAME}/2"]
    assert server.chat().status_code == 200


def test_a_registry_that_is_away_changes_nothing(two_versions, serve, monkeypatch):
    server = serve(two_versions.source())
    database = two_versions.root / "mlflow.db"
    kept = database.read_bytes()
    database.write_bytes(b"no database at all " * 100)
    until(lambda: server.health()["registry"] != "ok")
    assert server.chat().status_code == 200
    database.write_bytes(kept)
    until(lambda: server.health()["registry"] == "ok")


def test_the_candidate_stands_in_until_there_is_a_champion(two_versions, serve, caplog):
    two_versions.client.delete_registered_model_alias(NAME, "champion")
    with pytest.raises(InputError, match="no champion and no candidate"):
        two_versions.source().wanted()
    two_versions.point("candidate", 2)
    server = serve(two_versions.source())
    assert f"{NAME} has no champion yet: the candidate, version 2, answers" in caplog.text
    assert server.chat().json()["system_fingerprint"] == f"{NAME}/2"
    two_versions.point("champion", 1)
    until(lambda: server.chat().json()["system_fingerprint"] == f"{NAME}/1")


def test_an_unknown_model_is_told(registry):
    registry.client.delete_registered_model(NAME)
    with pytest.raises(InputError, match=f"{NAME}: has no champion and no candidate in sqlite"):
        registry.source().wanted()


def test_a_challenger_gets_its_share_and_keeps_its_conversations(two_versions, serve):
    two_versions.point("candidate", 2)
    server = serve(two_versions.source("candidate"), challenger_share=0.3, interval=5.0)
    seen = {}
    for user in map(str, range(60)):
        for _ in range(2):
            reply = server.chat(user=user, max_tokens=1)
            seen.setdefault(user, set()).add(reply.json()["system_fingerprint"])
    assert all(len(versions) == 1 for versions in seen.values())
    share = sum(versions == {f"{NAME}/2"} for versions in seen.values()) / len(seen)
    assert 0.1 < share < 0.5  # 3.4 standard errors of 60 draws
    # One conversation: what is said later does not move it.
    longer = [*HELLO, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "and now?"}]
    one, two = (server.chat(m, max_tokens=1).json()["system_fingerprint"] for m in (HELLO, longer))
    assert one == two
    # A version may be named as well.
    assert server.chat(model=f"{NAME}/2", user="0").json()["system_fingerprint"] == f"{NAME}/2"


class Toys:
    """Versions in memory, to follow what is loaded and when."""

    def __init__(self, make_live):
        self.make_live, self.now, self.loaded, self.broken = make_live, {}, [], set()
        self.name, self.fleet = "toy", None

    def wanted(self):
        return {role: Version("toy", number) for role, number in self.now.items()}

    def load(self, version):
        assert self.fleet.count_loaded() < MOST_MODELS
        if version.number in self.broken:
            raise RLHFError("broken")
        self.loaded.append(version.number)
        return self.make_live(version.number)


@pytest.fixture
def toys(make_live):
    source = Toys(make_live)
    source.fleet = Fleet("toy", 0.5)
    return source, source.fleet, Watcher(source.fleet, source, 0.3)


def roles(fleet):
    return {r: live.version.number for r in (CHAMPION, CHALLENGER) if (live := fleet.role(r))}


def test_never_more_than_two_models_and_a_promoted_challenger_is_not_loaded_again(toys):
    source, fleet, watcher = toys
    source.now = {CHAMPION: "1", CHALLENGER: "2"}
    watcher.look()
    assert roles(fleet) == {CHAMPION: "1", CHALLENGER: "2"}
    source.now = {CHAMPION: "2"}  # promoted
    watcher.look()
    assert (roles(fleet), source.loaded, fleet.count_loaded()) == ({CHAMPION: "2"}, ["1", "2"], 1)
    source.now = {CHAMPION: "2", CHALLENGER: "3"}
    watcher.look()
    source.now = {CHAMPION: "4", CHALLENGER: "3"}  # the challenger makes room, and comes back
    watcher.look()
    assert roles(fleet) == {CHAMPION: "4", CHALLENGER: "3"}
    assert source.loaded == ["1", "2", "3", "4", "3"]
    assert fleet.count_loaded() == 2


def test_a_new_champion_that_is_broken_costs_neither_the_old_one_nor_the_challenger(toys):
    source, fleet, watcher = toys
    source.now = {CHAMPION: "1", CHALLENGER: "2"}
    watcher.look()
    source.broken, source.now = {"3"}, {CHAMPION: "3", CHALLENGER: "2"}
    watcher.look()
    assert roles(fleet) == {CHAMPION: "1", CHALLENGER: "2"}
    loaded = list(source.loaded)
    watcher.look()  # too early for another try
    assert source.loaded == loaded
    source.broken = set()
    time.sleep(0.7)
    watcher.look()
    assert roles(fleet) == {CHAMPION: "3", CHALLENGER: "2"}


def test_a_third_model_waits_until_the_old_one_has_answered(toys):
    source, fleet, watcher = toys
    source.now = {CHAMPION: "1"}
    watcher.look()
    held = fleet.acquire("toy", "x")
    source.now = {CHAMPION: "2"}
    watcher.look()
    assert (roles(fleet), fleet.count_loaded()) == ({CHAMPION: "2"}, 2)
    source.now = {CHAMPION: "3"}
    thread = threading.Thread(target=watcher.look)
    thread.start()
    time.sleep(0.2)
    assert roles(fleet) == {CHAMPION: "2"}
    fleet.release(held)
    thread.join(10)
    assert (roles(fleet), fleet.count_loaded()) == ({CHAMPION: "3"}, 1)


def test_without_a_champion_there_is_no_start(toys):
    source, _, watcher = toys
    source.now, source.broken = {CHAMPION: "1"}, {"1"}
    with pytest.raises(RLHFError, match="broken"):
        watcher.start()


def test_a_directory_is_named_by_its_weights(tiny_model_dir, other_model_dir):
    versions = {
        DirectorySource(path, "toy", RUN, CAPACITY).version for path in (tiny_model_dir, other_model_dir)
    }
    assert len(versions) == 2
    assert all(len(version.number) == 12 for version in versions)
