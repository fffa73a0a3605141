"""Makes what the servers of `rlhf up` find when they start: databases, their tables, the user of the login.

The Prefect server brings its own tables up to date when it starts, and SQLite files make themselves. Run as
`python -m flows.databases`; secrets come by the environment (flows/settings.py).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flows import settings
from flows.settings import Settings
from rlhf_core.atomic import write_text
from rlhf_core.errors import RLHFError
from rlhf_core.redaction import without_secrets

# Else every request hashes the password anew, which takes half a second on a slow machine. So long a password
# that was changed goes on to be taken.
AUTH_CACHE_SECONDS = 60


def make_databases(url: str) -> list[str]:
    """Make the databases that are missing on the Postgres server; their names.

    Raises RLHFError when it cannot be reached, or the user may not make them.
    """
    import psycopg
    from psycopg import sql
    from sqlalchemy.engine import make_url

    made = []
    for name in ("prefect", "mlflow"):
        wanted = make_url(settings.database_url(url, name, "psycopg"))
        there = wanted.set(drivername="postgresql", database="postgres").render_as_string(hide_password=False)
        try:
            with psycopg.connect(there, autocommit=True, connect_timeout=10) as connection:
                found = connection.execute("select 1 from pg_database where datname = %s", [wanted.database])
                if found.fetchone() is None:
                    database = sql.Identifier(str(wanted.database))
                    connection.execute(sql.SQL("create database {}").format(database))
                    made.append(str(wanted.database))
        except psycopg.Error as error:
            words = without_secrets(" ".join(str(error).split()))
            raise RLHFError(f"Postgres, database {wanted.database} at {wanted.host}: {words}") from None
    return made


def migrate_mlflow(url: str) -> None:
    """Make MLflow's tables, or bring those of an older MLflow up to date."""
    from mlflow.store.db import utils

    engine = utils.create_sqlalchemy_engine_with_retry(url)
    try:
        if utils._all_tables_exist(engine):
            utils._upgrade_db(engine)
        else:
            utils._safe_initialize_tables(engine)
    finally:
        engine.dispose()


def make_user(wanted: Settings) -> None:
    """The user of the login, with the password that it has now; MLflow itself would keep the first one."""
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    user, _, password = wanted.login.partition(":")
    file = Path(wanted.users.removeprefix("sqlite:///"))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)
    entries = {
        "default_permission": "EDIT",
        "database_uri": wanted.users,
        "admin_username": user,
        "auth_cache_ttl_seconds": AUTH_CACHE_SECONDS,
    }
    lines = "".join(f"{key} = {value}\n" for key, value in entries.items())
    write_text(wanted.users_file, f"[mlflow]\n{lines}")
    store = SqlAlchemyStore()
    store.init_db(wanted.users)
    if store.has_user(user):
        store.update_user(user, password=password, is_admin=True)
    else:
        store.create_user(user, password, is_admin=True)


def main() -> None:
    root = Path.cwd().resolve()
    try:
        wanted = settings.read(root, settings.HOST, 0, 0, 0, os.environ)
        if wanted.database:
            for name in make_databases(wanted.database):
                print(f"made database {name}")
            migrate_mlflow(wanted.mlflow_database)
        if wanted.login:
            make_user(wanted)
    except RLHFError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
