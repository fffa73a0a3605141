"""The subprocess helper against real processes that do not want to end."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from tasks import processes
from tasks.processes import LineSplitter, run_command


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(processes.end_tree, "__defaults__", (1.0,))


def run(code, tmp_path, **options):
    lines: list[str] = []
    options = {"time_limit": 30.0, "on_line": lines.append} | options
    done = run_command(
        [sys.executable, "-u", "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        env=dict(os.environ),
        log_file=tmp_path / "log",
        **options,
    )
    return done, lines


def wait_gone(pid, seconds=10.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_output_is_streamed_and_kept(tmp_path):
    done, lines = run("import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)", tmp_path)
    assert done.returncode == 3
    assert sorted(lines) == ["one", "two"]
    assert sorted((tmp_path / "log").read_text().split()) == ["one", "two"]
    assert "two" in done.tail


def test_progress_bars_are_thinned_but_lines_are_not():
    splitter = LineSplitter()
    found = list(splitter.feed(b"start\n\r10%\r20%\r30%\nend\n"))
    assert found == ["start", "10%", "end"]
    assert list(splitter.feed(b"half")) == []
    assert list(splitter.feed(b" line\n")) == ["half line"]


CHILDREN = """
    import os, signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    same_group = subprocess.Popen([sys.executable, "-c", code])
    own_session = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    print(os.getpid(), same_group.pid, own_session.pid)
    time.sleep(60)
"""


def test_time_limit_ends_a_command_that_ignores_term_and_all_its_children(tmp_path):
    started = time.monotonic()
    done, lines = run(CHILDREN, tmp_path, time_limit=3.0)
    assert done.timed_out
    assert time.monotonic() - started < 20
    assert all(wait_gone(int(pid)) for pid in lines[0].split())


def test_cancel_ends_the_command_and_all_its_children(tmp_path):
    pids: list[str] = []

    def cancel(line):
        pids.extend(line.split())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(CHILDREN, tmp_path, on_line=cancel)
    assert len(pids) == 3
    assert all(wait_gone(int(pid)) for pid in pids)


@pytest.mark.parametrize("handler", ["SIG_DFL", "SIG_IGN"])
def test_killed_parent_takes_its_command_along(handler, tmp_path):
    code = f"""
        import os, signal, sys
        from pathlib import Path
        from tasks.processes import run_command
        signal.signal(signal.SIGTERM, signal.{handler})
        run_command(
            [sys.executable, "-u", "-c", "import os, time; print(os.getpid()); time.sleep(60)"],
            cwd=Path({str(tmp_path)!r}), env=dict(os.environ), on_line=lambda line: print(line, flush=True),
            log_file=Path({str(tmp_path / "log")!r}), time_limit=60,
        )
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert wait_gone(child)


@pytest.mark.parametrize("waited_for", [True, False], ids=["gone", "zombie"])
def test_a_stage_does_not_begin_for_a_run_that_was_killed_before(waited_for, tmp_path):
    """It may die while the stage's Python starts; no parent is left then that could send a signal."""
    run_of_it = subprocess.Popen([sys.executable, "-c", ""])
    if waited_for:
        run_of_it.wait()
    else:
        wait_gone(run_of_it.pid)
    stage = subprocess.run(
        [sys.executable, "-m", "rlhf_core.cli", "prepare"],
        cwd=tmp_path,
        env=os.environ | {"RLHF_DIE_WITH_PARENT": str(run_of_it.pid)},
        capture_output=True,
        check=False,
    )
    assert stage.returncode == 130
    assert list(tmp_path.iterdir()) == []
    run_of_it.wait()
