"""`rlhf doctor`: looks at all that a run needs, and says what to do about what is missing.

Each check gives findings and raises nothing; nothing is changed, and no model is loaded.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import psutil

from rlhf_core.config import Params, load_params
from rlhf_core.errors import RLHFError
from rlhf_core.layout import Layout
from rlhf_core.mlflow_writer import tracking_uri
from rlhf_core.redaction import without_secrets
from rlhf_core.rollout_engines.server import find_program
from tasks import gpus
from tasks.network import answers, port_is_free
from tasks.workspace import BusyError, check_workspace, exclusive

GIB = 2**30
RUN_DISK, LEAST_DISK = 5 * GIB, 1 * GIB  # a default run leaves 2.5 GiB
REMOTE_SECONDS = 30.0
RUN_MEMORY = 6 * GIB  # a stage of a default run takes up to 5
PINNED = ("torch", "transformers", "prefect", "mlflow", "dvc", "great_expectations")
PORTS = {
    "Prefect": ("RLHF_PREFECT_PORT", 4200),
    "MLflow": ("RLHF_MLFLOW_PORT", 5000),
    "Feedback": ("RLHF_FEEDBACK_PORT", 8600),
}


class State(Enum):
    """How a check ended; only `FAIL` keeps a run from working."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """What one check saw, and what to do about it where there is something to do."""

    what: str
    state: State
    seen: str
    remedy: str = ""


def examine(root: Path) -> list[Finding]:
    """All findings on the workspace `root` and on this machine."""
    params, findings = _params(root)
    for check in (_versions, _machine, _workspace, _remote, _servers):
        findings += check(root)
    if params is not None:
        findings += [*_device(params), *_model(params), *_rollouts(params)]
    return findings


def _params(root: Path) -> tuple[Params | None, list[Finding]]:
    try:
        params = load_params(Layout(root).params)
    except RLHFError as error:
        return None, [
            Finding("params.yaml", State.FAIL, str(error), "correct it; git diff shows what changed")
        ]
    return params, [Finding("params.yaml", State.OK, "all values are valid")]


def _versions(root: Path) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield Finding(
        "Python",
        State.OK if supported else State.FAIL,
        version,
        "" if supported else "make a virtual environment with Python 3.11, 3.12 or 3.13",
    )
    file = root / "constraints.txt"
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", file.read_text(), re.M)) if file.is_file() else {}
    pins = {name.replace("-", "_").lower(): pin for name, pin in pins.items()}
    others = []
    for name in PINNED:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found.partition("+")[0] != pins.get(name, found).partition("+")[0]:
            others.append(f"{name} {found} for {pins[name]}")
    if others:
        yield Finding("packages", State.WARN, ", ".join(others), "pip install -c constraints.txt -e .")
    else:
        yield Finding(
            "packages", State.OK, "the tested versions" if pins else "no constraints.txt to compare"
        )


def _machine(root: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(root).free
    state = State.FAIL if free < LEAST_DISK else State.WARN if free < RUN_DISK else State.OK
    remedy = "" if state is State.OK else "free some; `rlhf gc` lists what nothing needs"
    yield Finding("disk", state, f"{free / GIB:.1f} GiB free", remedy)
    memory = psutil.virtual_memory().available
    enough = memory >= RUN_MEMORY
    yield Finding(
        "memory",
        State.OK if enough else State.WARN,
        f"{memory / GIB:.1f} GiB free, {psutil.cpu_count()} cores",
        "" if enough else "a default run takes 5 GiB: smaller micro_batch_size, model.gradient_checkpointing",
    )


def _device(params: Params) -> Iterator[Finding]:
    import torch

    from rlhf_core.modeling.loading import precision_warning, resolve_device, resolve_dtype

    try:
        device = resolve_device(params.run)
    except RLHFError as error:
        yield Finding("device", State.FAIL, str(error), "set run.device to auto")
        return
    dtype = str(resolve_dtype(params.run, device)).removeprefix("torch.")
    count = torch.cuda.device_count()
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    seen = f"{kind}, {dtype}, {count} GPU{'' if count == 1 else 's'}"
    if not count and (shown := gpus.visible()):
        seen = f"{seen}; the driver shows {len(shown)}, and torch sees none"
        yield Finding("device", State.WARN, seen, "nvidia-smi; a driver and a torch of one CUDA version")
    elif 1 < count != params.run.num_processes and device.type == "cuda":
        yield Finding("device", State.WARN, seen, f"run.num_processes: {count} would use them all")
    elif device.type == "cpu" and dtype == "float32" and params.run.precision == "auto":
        yield Finding("device", State.WARN, seen, "this processor has no bf16, so products take longer")
    elif precision_warning(params.run):
        yield Finding("device", State.WARN, seen, "this processor has no bf16: run.precision: auto is faster")
    else:
        yield Finding("device", State.OK, seen)


def _model(params: Params) -> Iterator[Finding]:
    from rlhf_core.modeling.loading import check_model_dir
    from rlhf_core.stages.base import find_package_file

    source, name = params.model.source, params.model.name
    try:
        if source == "package":
            seen = f"{find_package_file().name}, undamaged"
        elif source == "path":
            check_model_dir(Path(name))
            seen = name
        else:
            seen = "made by the run" if source == "scratch" else f"{name}, from the hub"
    except RLHFError as error:
        yield Finding("base model", State.FAIL, str(error), "see model in params.yaml")
    else:
        yield Finding("base model", State.OK, seen)


def _rollouts(params: Params) -> Iterator[Finding]:
    if params.ppo.rollout_engine == "own":
        return
    try:
        found = find_program(params.ppo.vllm)
    except RLHFError as error:
        yield Finding("rollouts", State.FAIL, str(error), "see ppo.vllm in params.yaml")
    else:
        yield Finding("rollouts", State.OK, f"by {found}")


def _workspace(root: Path) -> Iterator[Finding]:
    try:
        check_workspace(root)
        with exclusive(root):
            pass
    except BusyError as error:
        yield Finding("workspace", State.WARN, str(error))
    except RLHFError as error:
        yield Finding("workspace", State.FAIL, str(error))
    else:
        changed = _run(root, "git", "status", "--porcelain", "--untracked-files=no")
        seen = "no uncommitted changes" if changed == "" else "uncommitted changes"
        yield Finding("workspace", State.OK, f"git and DVC; {seen}")


def _remote(root: Path) -> Iterator[Finding]:
    listed = _run(root, sys.executable, "-m", "dvc", "config", "--list") or ""
    remotes = re.findall(r"^remote\.(.+)\.url=(.+)$", listed, re.M)
    verified = set(re.findall(r"^remote\.(.+)\.verify=(?i:true)$", listed, re.M))
    if not remotes:
        yield Finding("DVC remote", State.WARN, "none", "dvc remote add -d NAME URL; data lies here only")
    default = _run(root, sys.executable, "-m", "dvc", "config", "core.remote")
    for name, url in remotes:
        found = _asked(root, name, url) if "://" in url and name == default else _addressed(root, name, url)
        if found.state is State.OK and name not in verified:
            remedy = f"dvc remote modify {name} verify true; a damaged file would be taken for whole"
            found = Finding(found.what, State.WARN, f"{found.seen}; files are not verified", remedy)
        yield found


def _addressed(root: Path, name: str, url: str) -> Finding:
    if "://" in url:
        return Finding("DVC remote", State.OK, f"{name}: {without_secrets(url)} (not asked)")
    path = (root / ".dvc" / url).resolve()  # DVC keeps a relative path as seen from its own directory
    if (parent := _existing(path)) and parent.is_dir() and os.access(parent, os.W_OK):
        return Finding("DVC remote", State.OK, f"{name}: {path}")
    return Finding("DVC remote", State.FAIL, f"{name}: {path} cannot be written", "dvc remote modify")


def _asked(root: Path, name: str, url: str) -> Finding:
    command = [sys.executable, "-m", "tasks.remote", "check"]
    seen = f"{name}: {without_secrets(url)}"
    try:
        done = subprocess.run(
            command, cwd=root, capture_output=True, text=True, check=False, timeout=REMOTE_SECONDS
        )
    except subprocess.TimeoutExpired:
        remedy = "is it up, and the address right?"
        return Finding("DVC remote", State.FAIL, f"{seen}: no answer in {REMOTE_SECONDS:.0f} s", remedy)
    if done.returncode == 0:
        return Finding("DVC remote", State.OK, f"{seen} answers")
    if done.stderr:
        return Finding("DVC remote", State.FAIL, done.stderr.strip()[-300:], "see docs/servers.md")
    return Finding(
        "DVC remote", State.WARN, f"{seen} lacks files of dvc.lock", "dvc push; then `rlhf remote mend`"
    )


def _servers(root: Path) -> Iterator[Finding]:
    urls = {"Prefect": os.environ.get("PREFECT_API_URL"), "MLflow": tracking_uri(root)}
    for what, (variable, default) in PORTS.items():
        url = urls.get(what) or ""
        if url.startswith("http"):
            health = f"{url.removesuffix('/')}/health"
            up = answers(health)
            yield Finding(
                what,
                State.OK if up else State.FAIL,
                f"{url} {'answers' if up else 'does not answer'}",
                "" if up else "start it (make up), or unset the variable that names it",
            )
            continue
        port = int(os.environ.get(variable, default))
        free = port_is_free(port)
        seen = f"none named; port {port} is {'free' if free else 'taken, `make up` takes another'}"
        yield Finding(what, State.OK, seen)


def _run(root: Path, *command: str) -> str | None:
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _existing(path: Path) -> Path | None:
    """`path`, or the nearest directory above it that exists."""
    return next((p for p in (path, *path.parents) if p.exists()), None)


def show(findings: list[Finding], say: Callable[[object], None]) -> None:
    """A table of all findings, and what to do below it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "", "seen", "what to do"):
        table.add_column(column, overflow="fold")
    styles = {State.OK: "green", State.WARN: "yellow", State.FAIL: "bold red"}
    for finding in findings:
        state = Text(finding.state.value, styles[finding.state])
        table.add_row(finding.what, state, Text(finding.seen), Text(finding.remedy))
    say(table)
    bad = sum(finding.state is State.FAIL for finding in findings)
    say("Ready for `rlhf run`." if not bad else f"{bad} of {len(findings)} checks failed.")


def main() -> None:
    from rich.console import Console

    findings = examine(Path.cwd().resolve())
    show(findings, Console().print)
    sys.exit(any(finding.state is State.FAIL for finding in findings))


if __name__ == "__main__":
    main()
