"""The doctor finds each ailment that is planted, names it, and says what to do."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from rlhf_core.config import change_params
from rlhf_core.layout import Layout
from tasks import doctor
from tasks.doctor import GIB, State, examine
from tasks.workspace import exclusive


@pytest.fixture
def workspace(root, tmp_path, monkeypatch):
    """A git repository with DVC and the shipped parameters, with no server named."""
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    for name in ("params.yaml", "dvc.yaml", "constraints.txt"):
        (tmp_path / name).write_text((root / name).read_text())
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    remote = ["dvc", "remote", "add", "-q", "-d", "local", str(tmp_path / "remote")]
    subprocess.run(remote, cwd=tmp_path, check=True)
    change_params(Layout(tmp_path).params, {"model.source": "scratch", "pretrain.num_steps": 1})
    return tmp_path


def finding(workspace, what):
    (found,) = [f for f in examine(workspace) if f.what == what]
    return found


def test_a_workspace_that_can_run_has_no_failure(workspace):
    found = examine(workspace)
    assert [f for f in found if f.state is State.FAIL] == []
    assert {f.what for f in found} >= {"params.yaml", "Python", "packages", "disk", "device", "base model"}


def test_no_git_and_no_dvc_yaml(tmp_path):
    assert "no dvc.yaml here" in finding(tmp_path, "workspace").seen
    assert finding(tmp_path, "params.yaml").state is State.FAIL


def test_a_wrong_value_is_named(workspace):
    text = (workspace / "params.yaml").read_text()
    (workspace / "params.yaml").write_text(text.replace("kl_coef: 0.05", "kl_coef: -1"))
    found = finding(workspace, "params.yaml")
    assert found.state is State.FAIL
    assert "ppo.kl_coef" in found.seen


def test_an_untested_version_is_named(workspace):
    (workspace / "constraints.txt").write_text("prefect==0.0.1\nmlflow==999\n")
    found = finding(workspace, "packages")
    assert found.state is State.WARN
    assert "for 0.0.1" in found.seen
    assert "for 999" in found.seen


@pytest.mark.parametrize(("free", "state"), [(0.5, State.FAIL), (3, State.WARN), (50, State.OK)])
def test_room_on_the_disk(workspace, monkeypatch, free, state):
    usage = namedtuple("usage", "total used free")(100 * GIB, 0, int(free * GIB))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _path: usage)
    assert finding(workspace, "disk").state is state


def test_gpus_that_torch_does_not_see(workspace, monkeypatch):
    monkeypatch.setattr(doctor.gpus, "visible", lambda: ["0", "1"])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    found = finding(workspace, "device")
    assert found.state is State.WARN
    assert "the driver shows 2, and torch sees none" in found.seen


@pytest.mark.parametrize(
    ("precision", "remedy"),
    [("auto", "so products take longer"), ("bfloat16", "run.precision: auto is faster"), ("float32", "")],
)
def test_a_processor_without_bfloat16(workspace, monkeypatch, precision, remedy):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(doctor.gpus, "visible", lambda: [])
    change_params(Layout(workspace).params, {"run.precision": precision})
    found = finding(workspace, "device")
    assert remedy in found.remedy
    assert (found.state is State.WARN) == bool(remedy)


def test_a_model_that_is_not_there(workspace):
    values = {"model.source": "path", "model.name": str(workspace / "nothing")}
    change_params(Layout(workspace).params, values)
    found = finding(workspace, "base model")
    assert found.state is State.FAIL
    assert str(workspace / "nothing") in found.seen


def test_a_rollout_engine_whose_program_is_not_there(workspace):
    assert not [found for found in examine(workspace) if found.what == "rollouts"]
    change_params(Layout(workspace).params, {"ppo.rollout_engine": "vllm", "ppo.vllm.program": "/none/vllm"})
    found = finding(workspace, "rollouts")
    assert found.state is State.FAIL
    assert "ppo.vllm.program = '/none/vllm'" in found.seen
    change_params(Layout(workspace).params, {"ppo.vllm.program": "/bin/sh"})
    assert finding(workspace, "rollouts").seen == "by /bin/sh"


def test_a_remote_that_cannot_be_written(workspace):
    (workspace / "remote").write_text("a file")
    assert finding(workspace, "DVC remote").state is State.FAIL


def test_a_remote_whose_files_are_not_verified(workspace):
    assert "not verified" in finding(workspace, "DVC remote").seen
    subprocess.run(["dvc", "remote", "modify", "-q", "local", "verify", "true"], cwd=workspace, check=True)
    assert finding(workspace, "DVC remote").state is State.OK


def test_a_storage_that_does_not_answer(workspace, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "planted-key")
    subprocess.run(
        ["dvc", "remote", "add", "-q", "-d", "-f", "far", "s3://bucket/x"], cwd=workspace, check=True
    )
    for name, value in (("endpointurl", "http://127.0.0.1:9"), ("connect_timeout", "1"), ("verify", "true")):
        subprocess.run(["dvc", "remote", "modify", "-q", "far", name, value], cwd=workspace, check=True)
    subprocess.run(["dvc", "remote", "remove", "-q", "local"], cwd=workspace, check=True)
    (workspace / "out.dvc").write_text(f"outs:\n- md5: '{'0' * 32}'\n  path: out\n")
    found = finding(workspace, "DVC remote")
    assert found.state is State.FAIL
    assert "bucket/x cannot be asked" in found.seen
    assert "planted-key" not in found.seen


def test_no_remote(workspace):
    subprocess.run(["dvc", "remote", "remove", "-q", "local"], cwd=workspace, check=True)
    assert finding(workspace, "DVC remote").state is State.WARN


def test_another_run_at_work(workspace):
    with exclusive(workspace):
        found = finding(workspace, "workspace")
    assert found.state is State.WARN
    assert "another run works here" in found.seen


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/api/health" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_a_server_that_is_named_must_answer(workspace, monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Healthy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/api"
    monkeypatch.setenv("PREFECT_API_URL", url)
    assert finding(workspace, "Prefect") == doctor.Finding("Prefect", State.OK, f"{url} answers")
    server.shutdown()
    server.server_close()
    assert finding(workspace, "Prefect").state is State.FAIL


def test_a_port_that_is_taken(workspace, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("RLHF_MLFLOW_PORT", str(taken.getsockname()[1]))
        assert "taken" in finding(workspace, "MLflow").seen


def test_the_status_says_whether_a_run_can_start(workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    with pytest.raises(SystemExit) as ended:
        doctor.main()
    assert ended.value.code == 0
    assert "Ready for `rlhf run`." in capsys.readouterr().out
    (workspace / "remote").write_text("a file")
    with pytest.raises(SystemExit) as ended:
        doctor.main()
    assert ended.value.code == 1
    assert "1 of" in capsys.readouterr().out
