"""Where servers listen and who may ask: beyond loopback a login; secrets only where they belong."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows import settings
from rlhf_core.errors import InputError
from tasks.network import free_port

URL = "postgresql://ann:p%40ss%2Fword@db:5433/team"
LOGIN = "ann:correct horse battery"
EVERYTHING = {"RLHF_DATABASE_URL": URL, "RLHF_AUTH": LOGIN, "RLHF_ARTIFACTS": "s3://bucket/runs"}


def read(host="127.0.0.1", **env):
    return settings.read(Path("/home/rlhf"), host, 4200, 5000, 8600, env)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_needs_no_login(host):
    assert read(host).login == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org", ""])
def test_beyond_loopback_a_login_is_needed(host):
    with pytest.raises(InputError, match="RLHF_AUTH"):
        read(host)
    assert read(host, RLHF_AUTH=LOGIN).login == LOGIN


@pytest.mark.parametrize("login", ["ann", "ann:", ":long enough a password", "ann:short"])
def test_a_login_that_protects_nothing_is_refused_and_not_repeated(login):
    with pytest.raises(InputError, match="12 letters") as caught:
        read("0.0.0.0", RLHF_AUTH=login)
    assert login not in str(caught.value)


@pytest.mark.parametrize("url", ["mysql://ann:secret@db/x", "ann:secret@db", "postgresql//ann:secret@db"])
def test_another_database_is_refused_without_its_password(url):
    with pytest.raises(InputError, match="RLHF_DATABASE_URL") as caught:
        read(RLHF_DATABASE_URL=url)
    assert "secret" not in str(caught.value)


def test_artifacts_elsewhere_than_on_s3_are_refused():
    with pytest.raises(InputError, match="RLHF_ARTIFACTS"):
        read(RLHF_ARTIFACTS="/tmp/x")


def test_each_server_has_a_database_of_its_own_and_the_password_comes_through():
    found = read(RLHF_DATABASE_URL=URL)
    assert found.prefect_database == "postgresql+asyncpg://ann:p%40ss%2Fword@db:5433/team_prefect"
    assert found.mlflow_database == "postgresql+psycopg://ann:p%40ss%2Fword@db:5433/team_mlflow"
    assert settings.mlflow_server(found)["MLFLOW_BACKEND_STORE_URI"] == found.mlflow_database
    assert settings.prefect_server(found)["PREFECT_SERVER_DATABASE_CONNECTION_URL"] == found.prefect_database


def test_what_asks_the_servers_gets_the_login_and_no_database():
    found = read("0.0.0.0", **EVERYTHING)
    env = settings.clients(found, EVERYTHING | {"HOME": "/home/ann"})
    assert env["HOME"] == "/home/ann"
    assert env["PREFECT_API_AUTH_STRING"] == LOGIN
    assert (env["MLFLOW_TRACKING_USERNAME"], env["MLFLOW_TRACKING_PASSWORD"]) == tuple(LOGIN.split(":"))
    assert not any("p%40ss" in value for value in env.values())
    assert not set(EVERYTHING) & env.keys()
    assert env["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"  # from this machine


def test_no_secret_is_in_what_is_printed_of_settings():
    found = read("0.0.0.0", **EVERYTHING)
    assert "p%40ss" not in repr(found)
    assert "horse" not in repr(found)


def test_artifacts_on_s3_go_through_the_server():
    env = settings.mlflow_server(read(RLHF_ARTIFACTS="s3://bucket/runs"))
    assert env["MLFLOW_SERVE_ARTIFACTS"] == "true"
    assert env["MLFLOW_ARTIFACTS_DESTINATION"] == "s3://bucket/runs"
    assert "MLFLOW_DEFAULT_ARTIFACT_ROOT" not in env
    assert settings.mlflow_server(read())["MLFLOW_SERVE_ARTIFACTS"] == "false"


def test_only_the_names_of_this_machine_are_answered_beyond_loopback():
    env = {"RLHF_AUTH": LOGIN, "RLHF_PUBLIC_HOST": "rlhf.example.org"}
    found = settings.mlflow_server(read("0.0.0.0", **env))["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert set(found) >= {"rlhf.example.org", "rlhf.example.org:5000", "127.0.0.1:5000"}
    assert not {"*", "0.0.0.0", "0.0.0.0:5000"} & set(found)
    assert "MLFLOW_SERVER_ALLOWED_HOSTS" not in settings.mlflow_server(read())


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(InputError, match="not an address of this machine"):
        free_port(4200, "203.0.113.7")  # reserved for documentation
