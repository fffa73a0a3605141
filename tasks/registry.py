"""The run in MLflow as a whole, and what it made in the registry: the policy, and two models behind it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException
from prefect.events import emit_event

from rlhf_core.config import Params
from rlhf_core.errors import InputError
from rlhf_core.layout import Layout
from rlhf_core.mlflow_writer import experiment_id, open_client, tracking_uri

ALIAS = "candidate"
REGISTERED = "rlhf.candidate.registered"  # the event
ANNOUNCED = "rlhf.announced"  # tag of a version for which the event was sent
PRODUCTS = ("sft", "reward")  # registered beside the policy, without their weights
REWARD_METRICS = ("reward/accuracy", "reward/accuracy_low", "reward/length_baseline_accuracy")


@dataclass(frozen=True)
class ParentRun:
    """The MLflow run that holds the runs of all stages."""

    run_id: str
    experiment: str
    uri: str
    origin: Mapping[str, str] = field(default_factory=dict)  # tags that say what started it


@contextmanager
def parent_run(root: Path, params: Params, name: str, origin: Mapping[str, str]) -> Iterator[ParentRun]:
    """Open the run of a flow; it ends FINISHED, FAILED or KILLED as the block does.

    `origin` becomes tags of the run, and of the version that is registered at its end.
    """
    client = open_client(root)
    experiment = experiment_id(client, root)
    run = client.create_run(experiment, run_name=name, tags=lineage(root) | dict(origin))
    run_id = run.info.run_id
    client.log_artifact(run_id, str(Layout(root).params))
    client.log_dict(run_id, params.model_dump(mode="json", by_alias=True), "params.json")
    status = "FINISHED"
    try:
        yield ParentRun(run_id, experiment, tracking_uri(root), origin)
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        raise
    finally:
        with contextlib.suppress(MlflowException):  # a store that is gone must not hide what ended the flow
            client.set_terminated(run_id, status)


def lineage(root: Path) -> dict[str, str]:
    """What a policy was made from: commit, lock, data, parameters, base."""
    layout = Layout(root)
    lock = root / "dvc.lock"
    commit = _git(root, "rev-parse", "HEAD")
    tags = {
        "git.commit": commit or "none",
        "git.dirty": str(bool(_git(root, "status", "--porcelain", "--untracked-files=no"))).lower(),
        "params.md5": md5(layout.params),
        "dvc.lock.md5": md5(lock),
    }
    if lock.is_file():
        for stage in yaml.safe_load(lock.read_text()).get("stages", {}).values():
            for out in stage.get("outs", []):
                if out["path"].startswith(("data/", "models/")):
                    tags[f"dvc.{out['path'].replace('/', '.')}"] = out.get("md5", "")
    return tags


def register_policy(root: Path, params: Params, parent: ParentRun) -> str:
    """Register models/policy as a new version with alias `candidate`; the same policy is not registered
    twice.

    Returns "NAME version N".
    """
    import mlflow

    from rlhf_core import serving

    name = params.flow.registered_model
    client = open_client(root)
    tags = lineage(root) | evaluation_tags(root) | dict(parent.origin) | {"mlflow.parent_run": parent.run_id}
    tags["ppo.reward_function"] = params.ppo.reward_function
    tags |= {f"{model}_model": register_product(root, client, name, model, tags) for model in PRODUCTS}
    version = _registered(client, name, tags)
    if version is None:
        mlflow.set_tracking_uri(parent.uri)
        mlflow.set_registry_uri(parent.uri)
        with mlflow.start_run(run_id=parent.run_id):
            info = serving.log_policy(Layout(root).model("policy"), name)
        version = str(info.registered_model_version)
        # The fluent API ends the run it joined; the flow is not over.
        client.update_run(parent.run_id, status="RUNNING")
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)
    client.set_registered_model_alias(name, ALIAS, version)
    client.set_tag(parent.run_id, "registered", f"{name}/{version}")
    if ANNOUNCED not in client.get_model_version(name, version).tags:  # also after a death before this
        announce(name, version)
        client.set_model_version_tag(name, version, ANNOUNCED, "true")
    return f"models:/{name}@{ALIAS} (version {version})"


def announce(name: str, version: str) -> None:
    """Tell Prefect's server that there is a new candidate; an automation may compare it."""
    resource = {"prefect.resource.id": f"rlhf.model.{name}.{version}", "prefect.resource.name": name}
    emit_event(REGISTERED, resource=resource, payload={"name": name, "version": version})


def register_product(root: Path, client: Any, name: str, model: str, tags: Mapping[str, str]) -> str:
    """Register models/`model` as NAME-MODEL without its weights, which DVC holds; "NAME-MODEL/VERSION".

    The version's source is a small file that says what it is and how to fetch it. The same weights are not
    registered twice.
    """
    registered, output = f"{name}-{model}", f"models/{model}"
    md5, commit = tags.get(f"dvc.models.{model}", ""), tags.get("git.commit", "")
    if not md5:
        raise InputError(f"{output}: dvc.lock does not name it, so it cannot be registered; run the stage")
    with contextlib.suppress(MlflowException):  # it is there already
        client.create_registered_model(registered)
    for found in client.search_model_versions(f"name='{registered}'", max_results=1000):
        if found.tags.get("dvc.md5") == md5:
            return f"{registered}/{found.version}"
    provenance = Layout(root).model(model) / "provenance.json"
    facts = {
        "dvc": {"path": output, "md5": md5},
        "fetch": _how_to_fetch(output, tags.get("rlhf.branch", ""), commit),
        "provenance": json.loads(provenance.read_text()) if provenance.is_file() else {},
        "params_md5": tags.get("params.md5", ""),
    }
    run_id = tags["mlflow.parent_run"]
    client.log_dict(run_id, facts, f"{model}/provenance.json")
    version = client.create_model_version(
        registered,
        f"{client.get_run(run_id).info.artifact_uri}/{model}",
        run_id=run_id,
        tags={"dvc.md5": md5, "dvc.path": output, "git.commit": commit} | _reward_tags(root, model),
    )
    return f"{registered}/{version.version}"


def _how_to_fetch(output: str, branch: str, commit: str) -> str:
    where = branch or "the commit that keeps this run (`git log -- dvc.lock`)"
    note = "" if branch else f", made from {commit}"
    return f"git checkout {where} -- dvc.lock && dvc pull {output}{note}"


def _reward_tags(root: Path, model: str) -> dict[str, str]:
    path = Layout(root).metrics("reward")
    if model != "reward" or not path.is_file():
        return {}
    found = json.loads(path.read_text())
    return {
        name.replace("/", "."): str(found[name]) for name in REWARD_METRICS if found.get(name) is not None
    }


def _registered(client: Any, name: str, tags: dict[str, str]) -> str | None:
    """The version that already holds these weights."""
    for found in client.search_model_versions(f"name='{name}'"):
        if found.tags.get("dvc.models.policy") == tags.get("dvc.models.policy") != "":
            return str(found.version)
    return None


def evaluation_tags(root: Path) -> dict[str, str]:
    """The evaluation's main numbers, and the versions of reward model and base."""
    layout = Layout(root)
    found = json.loads(layout.metrics("evaluate").read_text()) if layout.metrics("evaluate").is_file() else {}
    names = (
        "win_rate_over_sft",
        "win_rate_over_sft_low",
        "gold_gain_over_sft",
        "gold_gain_over_sft_low",
        "kl",
    )
    tags = {f"eval.{name}": str(found.get(f"eval/{name}")) for name in names}
    provenance = layout.model("base") / "provenance.json"
    tags |= _reward_tags(root, "reward")
    return tags | ({"base": provenance.read_text()[:4000]} if provenance.is_file() else {})


def log_result(root: Path, parent: ParentRun) -> None:
    """The end of a run: lock file, all metrics of the stages, reports."""
    client = open_client(root)
    layout = Layout(root)
    if (root / "dvc.lock").is_file():
        client.log_artifact(parent.run_id, str(root / "dvc.lock"))
    now = int(time.time() * 1000)
    found: dict[str, float] = {}
    for path in sorted((root / "reports").glob("*/metrics.json")):
        found |= json.loads(path.read_text())
    metrics = [Metric(name, value, now, 0) for name, value in found.items() if value is not None]
    tags = [RunTag(key, value) for key, value in lineage(root).items()]
    client.log_batch(parent.run_id, metrics=metrics, tags=tags)
    client.log_artifacts(parent.run_id, str(layout.evaluation), "evaluation")


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else ""


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
