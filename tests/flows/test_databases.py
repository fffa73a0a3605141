"""Databases on a real Postgres: made once, brought up to date, and no password in what is said of them."""

from __future__ import annotations

import os
import subprocess
import sys

import psycopg
import pytest

from flows import databases, settings
from rlhf_core.errors import RLHFError
from tests.pipeline import postgres


@pytest.fixture(scope="module")
def url():
    with postgres.serving() as found:
        yield found


def test_databases_are_made_once(url):
    assert databases.make_databases(f"{url}_once") == ["rlhf_once_prefect", "rlhf_once_mlflow"]
    assert databases.make_databases(f"{url}_once") == []


def test_a_wrong_password_is_said_without_it(url):
    wrong = url.replace("planted", "guessed")
    with pytest.raises(RLHFError, match="password authentication failed") as caught:
        databases.make_databases(wrong)
    assert "guessed" not in str(caught.value)


def test_a_server_that_is_not_there():
    with pytest.raises(RLHFError, match=r"database rlhf_prefect at 127\.0\.0\.1"):
        databases.make_databases("postgresql://ann:hunter2@127.0.0.1:9/rlhf")


def test_one_who_may_not_make_databases_is_told(url):
    with psycopg.connect(url.removesuffix("rlhf") + "postgres", autocommit=True) as connection:
        connection.execute("create role guest login password 'guest-password'")
    host = url.partition("@")[2]
    with pytest.raises(RLHFError, match="permission denied to create database"):
        databases.make_databases(f"postgresql://guest:guest-password@{host}_guest")


def test_tables_of_both_servers_are_made_and_brought_up_to_date(url, tmp_path):
    """MLflow's revision is set back by one and comes forward again; Prefect's own command does its part."""
    databases.make_databases(url)
    mlflow = settings.database_url(url, "mlflow", "psycopg")
    databases.migrate_mlflow(mlflow)
    plain = url + "_mlflow"

    def revision():
        with psycopg.connect(plain) as connection:
            return connection.execute("select version_num from alembic_version").fetchone()[0]

    newest = revision()
    env = os.environ | {"PREFECT_HOME": str(tmp_path)}
    downgrade = (
        "import sys, alembic.command as c\n"
        "from mlflow.store.db import utils as u\n"
        "e = u.create_sqlalchemy_engine_with_retry(sys.argv[1])\n"
        "config = u._get_alembic_config(e.url.render_as_string(hide_password=False))\n"
        "with e.begin() as connection:\n"
        "    config.attributes['connection'] = connection\n"
        "    c.downgrade(config, '-1')\n"
    )
    subprocess.run([sys.executable, "-c", downgrade, mlflow], env=env, check=True, capture_output=True)
    assert revision() != newest
    databases.migrate_mlflow(mlflow)
    assert revision() == newest

    env["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = settings.database_url(url, "prefect", "asyncpg")
    upgrade = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"]
    done = subprocess.run(upgrade, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with psycopg.connect(url + "_prefect") as connection:
        assert connection.execute("select count(*) from flow_run").fetchone() == (0,)


def test_the_login_of_today_counts(tmp_path, monkeypatch):
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore()
    for password in ("the first password", "the second one 2"):
        wanted = settings.read(tmp_path, "127.0.0.1", 1, 2, 3, {"RLHF_AUTH": f"ann:{password}"})
        databases.make_user(wanted)
        store.init_db(wanted.users)
        assert store.authenticate_user("ann", password)
    assert not store.authenticate_user("ann", "the first password")
    assert store.get_user("ann").is_admin
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"the second one 2" not in path.read_bytes()
    assert (tmp_path / ".rlhf" / "mlflow-users.db").stat().st_mode & 0o077 == 0
