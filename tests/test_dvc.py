"""dvc.yaml against the code: what a stage imports, it depends on; what it reads of params.yaml, it names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

from rlhf_core.config import Params
from rlhf_core.layout import Layout
from rlhf_core.stages import STAGES

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
    "rlhf_core.errors",
    "rlhf_core.layout",
    "rlhf_core.mlflow_writer",
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


def test_metrics_lie_where_the_runner_writes_them(root, stages):
    layout = Layout(root)
    for name, stage in stages.items():
        (metrics,) = (next(iter(entry)) for entry in stage["metrics"])
        assert root / metrics == layout.metrics(name)
