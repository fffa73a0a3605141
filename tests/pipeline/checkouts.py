"""Checkouts of the project for a test, and commands in them as a user's shell would run them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def environment(checkout: Path, **more: str) -> dict[str, str]:
    """The checkout's own code, and no setting of whoever runs the tests."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "RLHF_"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return clean | {"PATH": path, "PYTHONPATH": str(checkout), **more}


def run(command: list[str], cwd: Path, timeout: float = 400, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment(cwd, **env),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def start(command: list[str], cwd: Path, log: Path, **env: str) -> subprocess.Popen[bytes]:
    """Start a command whose output goes to `log`."""
    with log.open("wb") as file:
        return subprocess.Popen(
            command, cwd=cwd, env=environment(cwd, **env), stdout=file, stderr=subprocess.STDOUT
        )


def commit(checkout: Path, message: str) -> None:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    run(["git", "add", "-A"], checkout)
    done = run(["git", *who, "commit", "-q", "--allow-empty", "-m", message], checkout)
    assert done.returncode == 0, done.stderr


def make_checkout(root: Path, target: Path) -> Path:
    """A git repository of the project's files as they are now, without what git ignores."""
    listed = run(["git", "ls-files", "-co", "--exclude-standard"], root).stdout.splitlines()
    for name in listed:
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, target / name)
    run(["git", "init", "-q"], target)
    commit(target, "start")
    return target


def clone_with_cache(checkout: Path, target: Path, missing: tuple[str, ...] = ()) -> Path:
    """A clone on a DVC cache of its own, which lacks what the stages in `missing` have made.

    Stages before those come from the cache, and none from what DVC remembers of runs.
    """
    done = run(["git", "clone", "-q", str(checkout), str(target)], checkout)
    assert done.returncode == 0, done.stderr
    cache = target / ".dvc" / "cache"
    shutil.copytree(checkout / ".dvc" / "cache" / "files", cache / "files", copy_function=os.link)
    lock = yaml.safe_load((target / "dvc.lock").read_text())["stages"]
    for out in (out for stage in missing for out in lock[stage]["outs"]):
        (cache / "files" / "md5" / out["md5"][:2] / out["md5"][2:]).unlink(missing_ok=True)
    return target


def wait_for(found: Callable[[], Any], seconds: float = 300) -> Any:
    """The first true answer of `found`."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
    return value


def processes_below(directory: Path) -> dict[int, str]:
    """Command lines of the processes that work below `directory`, by number."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "cwd").startswith(str(directory)):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found
