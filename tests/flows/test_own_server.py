"""What a command without a server sets for its own."""

from __future__ import annotations

import os
import subprocess
import sys

ASK = """
from flows import own_server
own_server.prepare(apart=False)
from prefect.settings import get_current_settings
server = get_current_settings().server
print(server.register_blocks_on_start, server.memoize_block_auto_registration, server.logging_level)
"""


def said(tmp_path, root, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    env = clean | {"PYTHONPATH": str(root)} | environment
    done = subprocess.run([sys.executable, "-c", ASK], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_it_neither_writes_down_block_types_nor_notes_that_they_are_there(tmp_path, root):
    assert said(tmp_path, root) == ["False", "False", "ERROR"]
    assert (tmp_path / ".rlhf" / "prefect").is_dir()


def test_a_server_that_somebody_started_is_left_as_it_is(tmp_path, root):
    assert said(tmp_path, root, PREFECT_API_URL="http://127.0.0.1:9/api")[:2] == ["True", "True"]
    assert not (tmp_path / ".rlhf").exists()
