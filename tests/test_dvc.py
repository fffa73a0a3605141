"""dvc.yaml against the code: what a stage imports, it depends on; what it reads of params.yaml, it names."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlhf_core.config import Params, change_params, load_params
from rlhf_core.data.own_files import link_files
from rlhf_core.data.rows import read_rows
from rlhf_core.layout import Layout
from rlhf_core.stages import STAGES
from tasks.plan import plan

# Changes here cannot change an output: reporting, the frame around stages, and the shape of params.yaml,
# whose values DVC compares by itself.
NOT_IN_RESULTS = {
    "rlhf_core",
    "rlhf_core.atomic",
    "rlhf_core.checkpoint",
    "rlhf_core.config",
    "rlhf_core.config.collect",
    "rlhf_core.config.file",
    "rlhf_core.config.parts",
    "rlhf_core.config.promotion",
    "rlhf_core.config.retrain",
    "rlhf_core.config.sections",
    "rlhf_core.config.simulate",
    "rlhf_core.config.vllm",
    "rlhf_core.collector",
    "rlhf_core.errors",
    "rlhf_core.layout",
    "rlhf_core.mlflow_writer",
    "rlhf_core.parent_death",
    "rlhf_core.ports",
    "rlhf_core.redaction",
    "rlhf_core.stages",
    "rlhf_core.tracking",
    "rlhf_core.tracking_spool",
}


@pytest.fixture(scope="module")
def stages(root):
    return yaml.safe_load((root / "dvc.yaml").read_text())["stages"]


def module_file(root: Path, module: str) -> Path | None:
    path = root.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def imported_modules(root: Path, module: str, seen: set[str]) -> set[str]:
    """Every rlhf_core module that `module` imports, also inside functions, and theirs."""
    path = module_file(root, module)
    if module in seen or path is None:
        return seen
    seen.add(module)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            if name.startswith("rlhf_core"):
                imported_modules(root, name, seen)
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_stage_depends_on_every_module_it_imports(root, stages, stage):
    deps = [root / dep for dep in stages[stage]["deps"]]
    missing = []
    for module in sorted(imported_modules(root, f"rlhf_core.stages.{stage}", set()) - NOT_IN_RESULTS):
        path = module_file(root, module)
        if path.name == "__init__.py":
            continue
        if not any(path == dep or dep in path.parents for dep in deps):
            missing.append(str(path.relative_to(root)))
    assert not missing


def test_every_dependency_on_code_exists(root, stages):
    for stage in stages.values():
        for dep in stage["deps"]:
            if dep.startswith("rlhf_core"):
                assert (root / dep).exists(), dep


def test_stages_of_dvc_yaml_are_the_stages_of_the_code(stages):
    assert tuple(stages) == STAGES
    assert all(stage["cmd"] == f"rlhf {name}" for name, stage in stages.items())


def test_stage_names_the_sections_of_params_it_reads(root, stages):
    sections = {field.alias or name for name, field in Params.model_fields.items()}
    for name, stage in stages.items():
        source = (root / "rlhf_core" / "stages" / f"{name}.py").read_text()
        read = {s for s in sections if f"params.{s}." in source or f"params.{s}_." in source}
        read |= {s for s in sections if source.count(f"params.{s}\n") or source.count(f"params.{s},")}
        named = {param.split(".")[0] for param in stage["params"]}
        assert read <= named, name


@pytest.fixture
def project(root, stages, tmp_path):
    """Stage `prepare` alone, on files of a user's own; its code does not change here."""
    deps = [dep for dep in stages["prepare"]["deps"] if not dep.startswith("rlhf_core")]
    command = f"{sys.executable} -m rlhf_core.cli prepare"
    prepare = stages["prepare"] | {"cmd": command, "deps": deps, "metrics": []}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"prepare": prepare}}))
    (tmp_path / "params.yaml").write_text((root / "params.yaml").read_text())
    (tmp_path / "data" / "sources").mkdir(parents=True)
    ignored = (root / "data" / "sources" / ".gitignore").read_text()
    (tmp_path / "data" / "sources" / ".gitignore").write_text(ignored)
    names = {}
    for kind in ("demonstrations", "preferences", "prompts"):
        names[f"data.{kind}"] = [f"{kind}.jsonl"]
        write_own(tmp_path / f"{kind}.jsonl", "fine")
    change_params(tmp_path / "params.yaml", names)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    dvc(tmp_path, "init", "-q")
    return tmp_path


def write_own(path: Path, word: str) -> None:
    rows = [
        {"prompt": f"what is thing {n}?", "response": word, "chosen": f"thing {word}", "rejected": "no idea"}
        for n in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def dvc(where: Path, *words: str, fails: bool = False) -> str:
    env = os.environ | {"RLHF_TRACKING": "off"}
    command = [sys.executable, "-m", "dvc", *words]
    done = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) is fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def is_stale(where: Path) -> bool:
    return dvc(where, "status", "--json").strip() != "{}"


def test_a_changed_file_of_the_user_makes_prepare_stale(project):
    dvc(project, "repro", "-q")
    assert not is_stale(project)
    demonstrations = project / "demonstrations.jsonl"
    write_own(demonstrations, "good")  # as many bytes as before
    assert is_stale(project)
    dvc(project, "repro", "-q")
    assert not is_stale(project)
    rows = read_rows(Layout(project).prepared_file("demonstrations", "train"))
    assert {row["response"] for row in rows} == {"good"}
    write_own(project / "new", "nice")
    (project / "new").replace(demonstrations)
    assert is_stale(project)
    demonstrations.unlink()
    assert "demonstrations-0-demonstrations.jsonl" in dvc(project, "repro", fails=True)
    link_files(load_params(project / "params.yaml").data, Layout(project))  # as a flow does first
    assert "demonstrations.jsonl: no such file" in dvc(project, "repro", fails=True)


def test_in_a_clone_a_plan_finds_nothing_to_do(project):
    dvc(project, "repro", "-q")
    for link in Layout(project).sources.glob("[!.]*"):
        link.unlink()
    assert [item.reasons for item in plan(project, "", [])] == [[]]


def test_no_link_is_made_for_what_is_no_file(root, tmp_path):
    data = load_params(root / "params.yaml").data
    (tmp_path / "a.csv").write_text("a")
    (tmp_path / "b.csv").write_text("b")
    for names, linked in (
        (["package:chitchat", "hub:me/mine", "gone.jsonl", "."], []),
        (["package:chitchat", "a.csv"], ["demonstrations-1-a.csv"]),
        (["b.csv", str(tmp_path / "a.csv")], ["demonstrations-0-b.csv", "demonstrations-1-a.csv"]),
        (["a.csv"], ["demonstrations-0-a.csv"]),
    ):
        link_files(data.model_copy(update={"demonstrations": tuple(names)}), Layout(tmp_path))
        links = sorted(Layout(tmp_path).sources.iterdir())
        assert [link.name for link in links] == linked
        assert all(link.read_text() == link.stem[-1] for link in links)


def test_metrics_lie_where_the_runner_writes_them(root, stages):
    layout = Layout(root)
    for name, stage in stages.items():
        (metrics,) = (next(iter(entry)) for entry in stage["metrics"])
        assert root / metrics == layout.metrics(name)
