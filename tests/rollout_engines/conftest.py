"""A program `vllm` that tests can make fail."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.stages.conftest import small_params  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class FakeVLLM:
    """`program` is what params.yaml would name."""

    program: Path
    mode_file: Path

    def behave(self, mode):
        self.mode_file.write_text(mode)

    def asked(self, path):
        lines = self.mode_file.with_suffix(".asked").read_text().splitlines()
        return [body for where, body in map(json.loads, lines) if where == path]


@pytest.fixture(scope="session")
def make_fake(tmp_path_factory):
    def make():
        directory = tmp_path_factory.mktemp("vllm")
        fake = FakeVLLM(directory / "vllm", directory / "mode")
        fake.behave("")
        fake.program.write_text(
            f"#!{sys.executable}\nimport os, runpy, sys\n"
            f"os.environ['FAKE_VLLM'] = {str(fake.mode_file)!r}\nsys.path.insert(0, {str(ROOT)!r})\n"
            f"runpy.run_path({str(Path(__file__).with_name('fake_vllm.py'))!r}, run_name='__main__')\n"
        )
        fake.program.chmod(0o755)
        return fake

    return make
