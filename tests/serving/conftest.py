"""A running server over tiny models, and the pieces of it."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time

import httpx
import pytest
import torch
import uvicorn

from feedback.production import open_production
from feedback.store import Store
from rlhf_core.config import RunConfig
from rlhf_core.modeling.loading import load_policy
from serving.app import create_app
from serving.fleet import Fleet
from serving.models import Capacity, Version, load
from serving.registry import DirectorySource
from serving.service import Limits, Recorder, Service
from serving.watch import Watcher

RUN = RunConfig(seed=0, device="cpu", num_processes=1, sharding="none", precision="float32")
HELLO = [{"role": "user", "content": "hello there"}]
CAPACITY = Capacity(slots=4, queue=8, context=0)


@pytest.fixture(scope="session")
def loaded(tiny_model_dir):
    return load_policy(tiny_model_dir, RUN)


@pytest.fixture(scope="session")
def other_model_dir(tiny_model_dir, tmp_path_factory):
    """The same model with other weights."""
    from safetensors.torch import load_file, save_file

    directory = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny_model_dir, directory)
    path = directory / "model.safetensors"
    weights = load_file(path)
    generator = torch.Generator().manual_seed(1)
    weights = {name: w + 0.05 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    save_file(weights, path, metadata={"format": "pt"})
    return directory


@pytest.fixture
def make_live(tiny_model_dir):
    """Loaded versions, closed at the end."""
    made = []

    def make(number="1", directory=tiny_model_dir, capacity=CAPACITY):
        made.append(load(Version("toy", number), directory, RUN, capacity))
        return made[-1]

    yield make
    for live in made:
        live.close()


class Server:
    """A real server on a port of its own, with a client."""

    def __init__(self, source, *, challenger_share=0.0, limits=None, recorder=None, interval=0.1):
        self.fleet = Fleet(source.name, challenger_share)
        self.watcher = Watcher(self.fleet, source, interval)
        self.watcher.start()
        self.service = Service(self.fleet, self.watcher, limits or Limits(slots=4), recorder)
        config = uvicorn.Config(create_app(self.service), log_level="warning", timeout_graceful_shutdown=5)
        self.server = uvicorn.Server(config)
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def chat(self, messages=HELLO, *, headers=None, **values):
        body = {"messages": messages, "max_tokens": 16, "seed": 1} | values
        # Not httpx's own JSON, which refuses half a surrogate pair itself.
        headers = {"Content-Type": "application/json"} | (headers or {})
        return self.http.post("/v1/chat/completions", content=json.dumps(body), headers=headers)

    def events(self, messages=HELLO, *, headers=None, **values):
        """The bodies of a stream, and whether it ended as it should."""
        body = {"messages": messages, "max_tokens": 16, "seed": 1, "stream": True} | values
        found = []
        with self.http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as reply:
            assert reply.status_code == 200, reply.read()
            for line in reply.iter_lines():
                if line:
                    found.append(line.removeprefix("data: "))
        assert found[-1] == "[DONE]"
        return [json.loads(data) for data in found[:-1]]

    def health(self):
        return self.http.get("/healthz").json()

    def stop(self):
        self.http.close()
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()
        self.watcher.stop()
        self.fleet.close()


@pytest.fixture
def serve(tiny_model_dir):
    servers = []

    def start(source=None, **options):
        servers.append(Server(source or DirectorySource(tiny_model_dir, "toy", RUN, CAPACITY), **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def server(tiny_model_dir):
    """One server for the tests that change nothing."""
    started = Server(DirectorySource(tiny_model_dir, "toy", RUN, CAPACITY))
    yield started
    started.stop()


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path / "feedback.db")
    yield opened
    opened.close()


@pytest.fixture
def recorder(store):
    open_production(store)
    return Recorder(store, b"k" * 32)


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
