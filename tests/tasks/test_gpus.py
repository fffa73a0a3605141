"""GPUs are held by one run at a time; none is needed for these tests."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tasks import gpus

HOLDER = """
import sys, time
from tasks import gpus
with gpus.held(int(sys.argv[1]), print) as names:
    print(",".join(names), flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def three_gpus(monkeypatch, tmp_path, root):
    monkeypatch.setenv(gpus.VARIABLE, "0, 1,GPU-7")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(gpus, "POLL_SECONDS", 0.05)


def start_holder(wanted):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(wanted)], stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def refuse(text):
    raise AssertionError(text)


def test_runs_get_different_gpus_and_a_killed_one_gives_its_own_back():
    process, names = start_holder(2)
    assert names == "0,1"
    with gpus.held(1, refuse) as mine:
        assert mine == ["GPU-7"]
    waited = []

    def on_wait(text):
        waited.append(text)
        process.kill()

    with gpus.held(2, on_wait) as mine:
        assert mine == ["0", "1"]
    assert waited == ["waiting for 2 of 3 GPUs; other runs hold them"]
    process.wait()
    process.stdout.close()


def test_more_than_there_are_is_all_and_none_is_none(monkeypatch):
    with gpus.held(8, refuse) as mine:
        assert mine == ["0", "1", "GPU-7"]
    with gpus.held(0, refuse) as mine:
        assert mine == []
    monkeypatch.setenv(gpus.VARIABLE, "")
    with gpus.held(2, refuse) as mine:
        assert mine == []


def test_without_a_choice_the_drivers_own_count(monkeypatch, tmp_path):
    monkeypatch.delenv(gpus.VARIABLE)
    monkeypatch.setattr(gpus, "DRIVER", tmp_path / "driver")
    assert gpus.visible() == []
    for name in ("0000:3b:00.0", "0000:5e:00.0"):
        (tmp_path / "driver" / name).mkdir(parents=True)
    assert gpus.visible() == ["0", "1"]
