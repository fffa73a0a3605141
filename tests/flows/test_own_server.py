"""What a command without a server sets for its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from tasks.network import answers

ASK = """
from flows import own_server
own_server.prepare(apart=False)
from prefect.settings import get_current_settings
server = get_current_settings().server
print(server.register_blocks_on_start, server.memoize_block_auto_registration, server.logging_level)
print(own_server.is_lasting())
"""


def said(tmp_path, root, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    env = clean | {"PYTHONPATH": str(root)} | environment
    done = subprocess.run([sys.executable, "-c", ASK], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_it_neither_writes_down_block_types_nor_notes_that_they_are_there(tmp_path, root):
    assert said(tmp_path, root) == ["False", "False", "ERROR", "False"]
    assert (tmp_path / ".rlhf" / "prefect").is_dir()


def test_a_server_that_somebody_started_is_left_as_it_is(tmp_path, root):
    registers, notes, _, lasting = said(tmp_path, root, PREFECT_API_URL="http://127.0.0.1:9/api")
    assert (registers, notes, lasting) == ("True", "True", "True")
    assert not (tmp_path / ".rlhf").exists()


START = """
import os, sys
from flows import own_server
with own_server.starting(apart={apart}):
    import prefect
from prefect import flow
from prefect.client.orchestration import get_client

@flow
def hello():
    with get_client(sync_client=True) as client:
        print(client.server_type.name, own_server.is_lasting(), os.environ["PREFECT_HOME"])
        print(client.api_url)
hello()
{then}
"""


def started(tmp_path, root, *, apart=False, then="", **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    env = clean | {"PYTHONPATH": str(root)} | environment
    command = [sys.executable, "-c", START.format(apart=apart, then=then)]
    # A server that goes on holds the pipes, so this would wait for it.
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    return done, [line.split() for line in done.stdout.splitlines()]


def test_a_flow_finds_its_server_and_leaves_none(tmp_path, root):
    done, lines = started(tmp_path, root)
    assert done.returncode == 0, done.stderr
    assert lines[0] == ["SERVER", "False", str(tmp_path / ".rlhf" / "prefect")]
    assert "View at" not in done.stderr
    assert (tmp_path / ".rlhf" / "prefect" / "prefect.db").is_file()
    assert not answers(f"{lines[1][0].rstrip('/')}/health")


def test_one_apart_goes_with_its_process(tmp_path, root):
    done, lines = started(tmp_path, root, apart=True)
    assert done.returncode == 0, done.stderr
    assert "prefect-" in lines[0][2]
    assert not list((tmp_path / ".rlhf").iterdir())


def test_it_ends_with_a_process_that_is_killed(tmp_path, root):
    kill = "os.kill(os.getpid(), 9)"
    done, lines = started(tmp_path, root, then=f"sys.stdout.flush(); {kill}")
    assert done.returncode == -9
    deadline = time.monotonic() + 30
    while answers(f"{lines[1][0].rstrip('/')}/health"):
        assert time.monotonic() < deadline, "the server goes on"
        time.sleep(0.1)


def test_a_home_of_somebodys_own_stays_when_a_command_keeps_its_state_apart(tmp_path, root):
    home = tmp_path / "mine"
    home.mkdir()
    code = "from flows import own_server; own_server.prepare(apart=True)"
    env = os.environ | {"PYTHONPATH": str(root), "PREFECT_HOME": str(home)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    assert home.is_dir()


def test_where_prefects_own_settings_may_name_a_server_it_is_left_to_prefect(tmp_path, root):
    home = tmp_path / "mine"
    home.mkdir()
    (home / "profiles.toml").write_text(
        'active = "far"\n[profiles.far]\nPREFECT_API_URL = "http://127.0.0.1:9/api"\n'
    )
    done, _ = started(tmp_path, root, apart=True, PREFECT_HOME=str(home))
    assert done.returncode != 0
    assert "127.0.0.1:9" in done.stderr or "connection attempts failed" in done.stderr
    assert (home / "profiles.toml").is_file()


def test_a_server_that_cannot_start_is_said(tmp_path, root):
    (tmp_path / ".rlhf" / "prefect" / "prefect.db").mkdir(parents=True)
    done, _ = started(tmp_path, root)
    assert "RLHFError: Prefect's server ended with status" in done.stderr
