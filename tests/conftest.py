"""Shared fixtures: tiny models that need no network and no package."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# A suite that a script started in the background ignores Ctrl-C, and so would the commands that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# No test asserts a time: the machine may be busy with others.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")

ROOT = Path(__file__).resolve().parents[1]

TEXTS = [
    "hello there, how are you doing today?",
    "i like long walks and good books, what about you?",
    "that is great! i love the sea and the sun.",
    "no, i do not like rain, it is sad and bad.",
] * 8


@pytest.fixture
def deepspeed(monkeypatch):
    """Processes that a test starts find DeepSpeed, which `make test` installs apart."""
    apart = Path(sys.prefix) / "deepspeed"
    if not (apart / "deepspeed").is_dir() and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    paths = filter(None, (os.environ.get("PYTHONPATH"), str(apart)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setattr(sys, "path", [*sys.path, str(apart)])


@pytest.fixture(autouse=True)
def own_environment():
    """What a test leaves in the environment, as MLflow does with the store it is told, ends with it."""
    kept = dict(os.environ)
    yield
    for name in os.environ.keys() - kept.keys():
        del os.environ[name]
    os.environ.update(kept)


@pytest.fixture(autouse=True)
def own_signal_handlers():
    """What a command run inside a test makes of signals ends with it."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where two processes share the suite, a file stays in one of them.

    So do all of tests/pipeline, which share one finished run; they come first, since they take longest.
    """
    pipeline = ROOT / "tests" / "pipeline"
    items.sort(key=lambda item: pipeline not in item.path.parents)
    for item in items:
        name = "pipeline" if pipeline in item.path.parents else str(item.path)
        item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's own directory."""
    return ROOT


@pytest.fixture
def params():
    """The shipped params.yaml."""
    from rlhf_core.config import load_params

    return load_params(ROOT / "params.yaml")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama of some 60 thousand parameters with a tokenizer and chat template."""
    from rlhf_core.config import ScratchConfig
    from rlhf_core.modeling.scratch import make_scratch_model, make_scratch_tokenizer

    tokenizer = make_scratch_tokenizer(TEXTS, vocab_size=320)
    shape = ScratchConfig(vocab_size=320, hidden_size=32, num_layers=2, num_heads=2)
    directory = tmp_path_factory.mktemp("tiny")
    model = make_scratch_model(tokenizer, shape, seed=0)
    # As wide as in a trained model: with the initial embeddings all tokens stay nearly equally likely.
    model.get_input_embeddings().weight.data.mul_(15)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
