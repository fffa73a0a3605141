"""A Postgres of its own for a test: made in a temporary directory, on loopback, ended with the test."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from tasks.network import free_port

USER = "rlhf"
PASSWORD = f"planted@{secrets.token_hex(10)}/b:c"  # every letter that a URL must write otherwise
DEBIAN = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


def binaries() -> Path:
    """Where initdb and postgres lie; skips the test when they are nowhere."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    if DEBIAN:
        return DEBIAN[-1]
    pytest.skip("no Postgres here: apt-get install postgresql")


def _owner() -> str | None:
    """Postgres refuses to run as root; who shall instead. None: whoever runs the tests."""
    if os.getuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """A running server; its URL postgresql://USER:PASSWORD@HOST:PORT/rlhf."""
    programs, owner, port = binaries(), _owner(), free_port(5600 + os.getpid() % 300)
    top = Path(tempfile.mkdtemp(prefix="rlhf-pg-"))  # not below pytest's, which is closed to other users
    try:
        (top / "password").write_text(PASSWORD)
        if owner:
            for path in (top, top / "password"):
                shutil.chown(path, owner)
        login = ["-U", USER, f"--pwfile={top}/password", "-A", "scram-sha-256", "-E", "UTF8", "--no-sync"]
        done = subprocess.run(
            [programs / "initdb", "-D", top / "data", *login],
            user=owner,
            cwd=top,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        options = ["-h", "127.0.0.1", "-p", str(port), "-k", str(top), "-c", "fsync=off"]
        with (top / "log").open("wb") as log:
            server = subprocess.Popen(
                [programs / "postgres", "-D", top / "data", *options],
                user=owner,
                cwd=top,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            _wait(programs, port, top / "log")
            yield f"postgresql://{USER}:{quote(PASSWORD, safe='')}@127.0.0.1:{port}/rlhf"
        finally:
            server.terminate()
            server.wait(30)
    finally:
        shutil.rmtree(top, ignore_errors=True)


def _wait(programs: Path, port: int, log: Path) -> None:
    deadline = time.monotonic() + 60
    ready = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
    while subprocess.run(ready, check=False).returncode != 0:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
