"""Where the servers of `rlhf up` listen, keep their data, and who may ask them: from options and environment.

Secrets come by environment variables alone, since a command line can be read by everybody on the machine.
Each server gets those that it needs, and what runs beside them gets the login only.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf_core.cli import QUIET
from rlhf_core.errors import InputError
from rlhf_core.layout import Layout
from rlhf_core.redaction import without_secrets
from tasks.network import HOST, LOOPBACK

DATABASE = "RLHF_DATABASE_URL"  # postgresql://USER:PASSWORD@HOST:PORT/NAME
LOGIN = "RLHF_AUTH"  # USER:PASSWORD
ARTIFACTS = "RLHF_ARTIFACTS"  # s3://BUCKET/PATH
PUBLIC_HOST = "RLHF_PUBLIC_HOST"  # the name by which browsers reach this machine
OURS = (DATABASE, LOGIN, ARTIFACTS, PUBLIC_HOST)
EVERYWHERE = ("0.0.0.0", "::")
LEAST_PASSWORD = 12  # MLflow's own rule
HEARTBEAT_SECONDS = 30  # between two signs of life of a run; the least that Prefect sends


@dataclass(frozen=True)
class Settings:
    """What `rlhf up` was asked for. Empty means: SQLite, a directory here, no login."""

    root: Path
    prefect_port: int
    mlflow_port: int
    feedback_port: int  # on loopback always: the annotation service has accounts and options of its own
    host: str = HOST
    public_host: str = HOST
    database: str = ""
    artifacts: str = ""
    login: str = ""

    def __repr__(self) -> str:
        ports = self.prefect_port, self.mlflow_port, self.feedback_port
        return f"Settings({self.root}, {self.host}, {ports})"

    @property
    def near(self) -> str:
        """The address by which processes of this machine reach the servers."""
        return HOST if self.host in EVERYWHERE else self.host

    @property
    def prefect_url(self) -> str:
        return f"http://{self.near}:{self.prefect_port}"

    @property
    def mlflow_url(self) -> str:
        return f"http://{self.near}:{self.mlflow_port}"

    @property
    def prefect_database(self) -> str:
        return database_url(self.database, "prefect", "asyncpg") if self.database else ""

    @property
    def mlflow_database(self) -> str:
        if self.database:
            return database_url(self.database, "mlflow", "psycopg")
        return f"sqlite:///{self.root}/mlflow.db"

    @property
    def users(self) -> str:
        """The database of MLflow's users; it holds hashes of passwords."""
        return f"sqlite:///{Layout(self.root).state / 'mlflow-users.db'}"

    @property
    def users_file(self) -> Path:
        return Layout(self.root).state / "mlflow-auth.ini"


def read(
    root: Path,
    host: str,
    prefect_port: int,
    mlflow_port: int,
    feedback_port: int,
    env: Mapping[str, str],
) -> Settings:
    """Raises InputError that names the variable, never its value, when the settings do not fit together."""
    login, database, artifacts = (env.get(name, "") for name in (LOGIN, DATABASE, ARTIFACTS))
    if login:
        _check_login(login)
    elif host not in LOOPBACK:
        raise InputError(
            f"--host {host}: others can reach it, and no login is set: export {LOGIN}=USER:PASSWORD first, "
            f"or stay on {HOST}"
        )
    if database and not database.startswith(("postgresql://", "postgres://")):
        raise InputError(f"{DATABASE}: must be postgresql://USER:PASSWORD@HOST:PORT/NAME")
    if artifacts and not artifacts.startswith("s3://"):
        raise InputError(f"{ARTIFACTS}: {without_secrets(artifacts)!r} must be s3://BUCKET/PATH")
    public = env.get(PUBLIC_HOST) or (socket.getfqdn() if host in EVERYWHERE else host)
    return Settings(root, prefect_port, mlflow_port, feedback_port, host, public, database, artifacts, login)


def _check_login(login: str) -> None:
    user, _, password = login.partition(":")
    if not user or len(password) < LEAST_PASSWORD:
        raise InputError(f"{LOGIN}: must be USER:PASSWORD, the password of {LEAST_PASSWORD} letters or more")


def database_url(url: str, name: str, driver: str) -> str:
    """The URL of the database NAME_`name` for SQLAlchemy; each server has one of its own."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        found = make_url(url)
    except ArgumentError:
        raise InputError(f"{DATABASE}: must be postgresql://USER:PASSWORD@HOST:PORT/NAME") from None
    named = found.set(drivername=f"postgresql+{driver}", database=f"{found.database or 'rlhf'}_{name}")
    return named.render_as_string(hide_password=False)


def clients(settings: Settings, env: Mapping[str, str]) -> dict[str, str]:
    """The environment of what asks the servers: worker, runs, deployments."""
    bin_dir = str(Path(sys.executable).parent)
    found = {
        **QUIET,
        **{name: value for name, value in env.items() if name not in OURS},
        "PATH": f"{bin_dir}{os.pathsep}{env.get('PATH', '')}",
        "PREFECT_HOME": str(Layout(settings.root).state / "prefect-server"),
        "PREFECT_API_URL": f"{settings.prefect_url}/api",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        # Waits of 2, 4, 8, ... seconds: a run outlives four minutes without its server.
        "PREFECT_CLIENT_MAX_RETRIES": "7",
        "MLFLOW_TRACKING_URI": settings.mlflow_url,
    }
    if settings.login:
        user, _, password = settings.login.partition(":")
        found["PREFECT_API_AUTH_STRING"] = settings.login
        found |= {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}
    return found


def prefect_server(settings: Settings) -> dict[str, str]:
    """What the Prefect server needs beside the environment of a client."""
    found = {
        "PREFECT_UI_API_URL": f"http://{settings.public_host}:{settings.prefect_port}/api",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    }
    if settings.login:
        found["PREFECT_SERVER_API_AUTH_STRING"] = settings.login
    if settings.database:
        found["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = settings.prefect_database
    return found


def mlflow_server(settings: Settings) -> dict[str, str]:
    """What the MLflow server needs. Clients get artifacts on S3 through it, and need no keys for that."""
    found = {"MLFLOW_BACKEND_STORE_URI": settings.mlflow_database}
    if settings.artifacts:
        found |= {"MLFLOW_SERVE_ARTIFACTS": "true", "MLFLOW_ARTIFACTS_DESTINATION": settings.artifacts}
    else:
        found |= {
            "MLFLOW_SERVE_ARTIFACTS": "false",
            "MLFLOW_DEFAULT_ARTIFACT_ROOT": f"file://{settings.root}/mlartifacts",
        }
    if settings.login:
        found["MLFLOW_AUTH_CONFIG_PATH"] = str(settings.users_file)
        found["MLFLOW_FLASK_SERVER_SECRET_KEY"] = secrets.token_hex(32)  # sessions end with the server
    if settings.host not in LOOPBACK and "MLFLOW_SERVER_ALLOWED_HOSTS" not in os.environ:
        names = {settings.public_host, settings.host, settings.near, "localhost"} - set(EVERYWHERE)
        hosts = sorted(f"{name}{port}" for name in names for port in ("", f":{settings.mlflow_port}"))
        found["MLFLOW_SERVER_ALLOWED_HOSTS"] = ",".join(hosts)
    return found


def preparation(settings: Settings) -> dict[str, str]:
    """What flows/databases.py needs."""
    return {name: value for name, value in ((DATABASE, settings.database), (LOGIN, settings.login)) if value}
