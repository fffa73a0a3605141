"""Servers for a team: Postgres, artifacts and data on S3, a login; and no secret of these where others read.

Planted secrets are looked for after a whole run of the smoke profile.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import secrets
import signal
import sqlite3
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest

from tasks.network import free_port

from . import postgres, s3
from .checkouts import commit, processes_below, run, start, wait_for

# Made now: the checkouts of these tests hold this file.
LOGIN = f"ann:planted {secrets.token_hex(10)}"
LABELER_KEY = secrets.token_hex(20)
SECRETS = (
    s3.SECRET,
    postgres.PASSWORD,
    quote(postgres.PASSWORD, safe=""),
    LOGIN.partition(":")[2],
    base64.b64encode(LOGIN.encode()).decode(),
    LABELER_KEY,
)


def ask(url, body=None, login=LOGIN):
    """The answer as JSON or text; the status of a refusal."""
    headers = {"Content-Type": "application/json"}
    if login:
        headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
    request = urllib.request.Request(url, json.dumps(body).encode() if body is not None else None, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            text = reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None
    return json.loads(text) if text.startswith(("{", "[")) else text


@pytest.fixture(scope="module")
def storage():
    with s3.serving() as found:
        yield found


@pytest.fixture(scope="module")
def database():
    with postgres.serving() as found:
        yield found


def found_in(data):
    return [secret for secret in SECRETS if secret.encode() in data]


def leaks_in_files(root):
    """Files below `root` that hold a secret, objects of git unpacked."""
    leaks = {}
    for path in root.rglob("*"):
        if not path.is_file() or path.is_symlink():
            continue
        data = path.read_bytes()
        if re.search(r"\.git/objects/../", path.as_posix()):
            data = zlib.decompress(data)
        if found := found_in(data):
            leaks[str(path.relative_to(root))] = found
    return leaks


def dump_of(url, name):
    """All rows of a database as text."""
    program = postgres.binaries() / "pg_dump"
    done = subprocess.run([program, "--inserts", f"{url}_{name}"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_beyond_loopback_nothing_starts_without_a_login(root, tmp_path):
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    done = run(["rlhf", "up", "--host", "0.0.0.0"], tmp_path, PYTHONPATH=str(root))
    assert done.returncode == 2
    assert "no login is set: export RLHF_AUTH=USER:PASSWORD" in done.stderr
    assert "starting" not in done.stdout
    assert processes_below(tmp_path) == {}


def use_s3(checkout, storage):
    for command in (
        ["remote", "add", "-q", "-d", "-f", "store", f"s3://{s3.BUCKET}/{checkout.parent.name}/dvc"],
        ["remote", "modify", "-q", "store", "endpointurl", storage.endpoint],
    ):
        assert run(["dvc", *command], checkout).returncode == 0
    commit(checkout, "data on S3")


@contextlib.contextmanager
def team_servers(checkout, storage, database, log):
    """Addresses of Prefect and MLflow while `rlhf up` listens everywhere with all that a team sets."""
    env = {
        **storage.env,
        "RLHF_DATABASE_URL": database,
        "RLHF_AUTH": LOGIN,
        "RLHF_ARTIFACTS": f"s3://{s3.BUCKET}/{checkout.parent.name}/mlflow",
        "RLHF_PUBLIC_HOST": "127.0.0.1",
        "RLHF_PREFECT_PORT": str(free_port(4700)),
        "RLHF_MLFLOW_PORT": str(free_port(5700)),
        "MLFLOW_S3_ENDPOINT_URL": storage.endpoint,
        "RLHF_LABELER_API_KEY": LABELER_KEY,
    }
    up = start(["rlhf", "up", "--host", "0.0.0.0"], checkout, log, **env)
    try:
        wait_for(lambda: up.poll() is not None or "Ctrl-C stops" in log.read_text(), 300)
        assert up.poll() is None, log.read_text()
        yield re.findall(r"http://127\.0\.0\.1:\d+", log.read_text())[:2]
    finally:
        up.send_signal(signal.SIGINT)
        assert up.wait(90) == 0, log.read_text()


def no_secret_is_left(checkout, storage, database, log):
    assert found_in(log.read_bytes()) == []
    assert leaks_in_files(checkout) == {}
    for name in ("prefect", "mlflow"):
        assert found_in(dump_of(database, name)) == [], name
    for key in storage.names(checkout.parent.name):
        body = storage.client.get_object(Bucket=s3.BUCKET, Key=key)["Body"].read()
        assert found_in(body) == [], key


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_servers_for_a_team_ask_for_the_login_and_a_run_on_them_leaves_no_secret(
    finished, storage, database, labeler, tmp_path
):
    checkout, log, database = tmp_path / "rlhf", tmp_path / "up.log", f"{database}_team"
    commit(finished[0], "keep the run")
    run(["git", "clone", "-q", str(finished[0]), str(checkout)], tmp_path)
    use_s3(checkout, storage)
    with team_servers(checkout, storage, database, log) as (prefect, mlflow):
        everyone_is_asked_who_they_are(prefect, mlflow)
        no_secret_on_a_command_line(checkout)
        a_client_without_keys_leaves_a_note(mlflow, tmp_path)
        start_run(prefect, {"dry_run": True, "profile": "smoke"})
        (planned,) = (a for a in ask(f"{prefect}/api/artifacts/filter", {}) if a["key"] == "plan")
        assert "of 9 stages would run" in planned["description"]
        chosen = ["preferences.labeler=endpoint", f"preferences.labeler_target={labeler}"]
        start_run(prefect, {"profile": "smoke", "overrides": chosen})
        query = "name=rlhf-policy&alias=candidate"
        policy = ask(f"{mlflow}/api/2.0/mlflow/registered-models/alias?{query}")["model_version"]
        assert {tag["key"] for tag in policy["tags"]} >= {"git.commit", "dvc.models.policy", "rlhf.branch"}
    # The client had no keys to S3: the server brought its text there.
    (key,) = (key for key in storage.names(f"{tmp_path.name}/mlflow") if key.endswith("note.txt"))
    assert storage.client.get_object(Bucket=s3.BUCKET, Key=key)["Body"].read() == b"a note"
    assert storage.names(f"{tmp_path.name}/dvc/files/md5") != []
    with psycopg.connect(f"{database}_mlflow") as connection:
        assert connection.execute("select count(*) from runs").fetchone()[0] >= 10
    assert not (checkout / "mlflow.db").exists()
    no_secret_is_left(checkout, storage, database, log)


def a_client_without_keys_leaves_a_note(mlflow, where):
    note = "import mlflow; mlflow.set_experiment('notes'); mlflow.log_text('a note', 'note.txt')"
    user, _, password = LOGIN.partition(":")
    client = {"MLFLOW_TRACKING_URI": mlflow, "MLFLOW_TRACKING_USERNAME": user}
    done = run([sys.executable, "-c", note], where, **client, MLFLOW_TRACKING_PASSWORD=password)
    assert done.returncode == 0, done.stderr


def everyone_is_asked_who_they_are(prefect, mlflow):
    for login in ("", "ann:a wrong password"):
        assert ask(f"{prefect}/api/deployments/filter", {}, login) == 401
        assert ask(f"{mlflow}/api/2.0/mlflow/experiments/search?max_results=5", login=login) == 401
    assert len(ask(f"{prefect}/api/deployments/filter", {})) >= 1
    assert "experiments" in ask(f"{mlflow}/api/2.0/mlflow/experiments/search?max_results=5")


def no_secret_on_a_command_line(checkout):
    lines = "\n".join(processes_below(checkout).values())
    assert "prefect" in lines
    assert found_in(lines.encode()) == []


class Labeler(BaseHTTPRequestHandler):
    """Rates by the length of the request, and asks for the key."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200 if self.headers["Authorization"] == f"Bearer {LABELER_KEY}" else 401)
        self.end_headers()
        answer = {"choices": [{"message": {"content": str(1 + len(body) % 10)}}]}
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def labeler():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Labeler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def start_run(prefect, parameters):
    """A run of the deployment to its good end."""
    (found,) = (d for d in ask(f"{prefect}/api/deployments/filter", {}) if d["name"] == "train")
    wanted = {"parameters": parameters}
    flow_run = ask(f"{prefect}/api/deployments/{found['id']}/create_flow_run", wanted)
    url = f"{prefect}/api/flow_runs/{flow_run['id']}"
    ends = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
    wait_for(lambda: ask(url)["state_type"] in ends, 600)
    state = ask(url)
    assert state["state_type"] == "COMPLETED", state["state"]


def test_what_looks_for_leaks_finds_them(tmp_path):
    """The search itself: a secret in a commit, a database and a log."""
    assert leaks_in_files(tmp_path) == {}
    (tmp_path / "notes").write_text(f"key={LABELER_KEY}")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    commit(tmp_path, "leak")
    (tmp_path / "notes").unlink()
    with sqlite3.connect(tmp_path / "runs.db") as connection:
        connection.execute("create table params (value text)")
        connection.execute("insert into params values (?)", [postgres.PASSWORD])
    Path(tmp_path / "log").write_text(f"opening postgresql://rlhf:{quote(postgres.PASSWORD, safe='')}@db/x")
    leaks = leaks_in_files(tmp_path)
    assert [LABELER_KEY] in leaks.values()
    assert leaks["runs.db"] == [postgres.PASSWORD]
    assert leaks["log"] == [quote(postgres.PASSWORD, safe="")]
