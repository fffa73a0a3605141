"""Data and models on S3: pushed, pulled, found damaged, mended; the keys to it come from the environment."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.remote import Remote, RemoteError, md5_of
from tests.pipeline import s3

pytest.importorskip("dvc_s3", reason="dvc-s3 is not installed: pip install '.[s3]'")


@pytest.fixture(scope="module")
def storage():
    with s3.serving() as found:
        yield found


def dvc(where, *words, ok=True):
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *words], cwd=where, capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(autouse=True)
def keys(storage, monkeypatch):
    for name, value in {**storage.env, "DVC_NO_ANALYTICS": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def home(storage, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**storage.env, "DVC_NO_ANALYTICS": "1"}.items():
            patch.setenv(name, value)
        return make_home(storage, tmp_path_factory.mktemp("s3") / "home")


def make_home(storage, made):
    (made / "mine").mkdir(parents=True)
    (made / "mine" / "weights").write_text("many numbers")
    (made / "mine" / "tokenizer").write_text("few words")
    subprocess.run(["git", "init", "-q", "-b", "main"], cwd=made, check=True)
    dvc(made, "init", "-q")
    dvc(made, "remote", "add", "-q", "-d", "s3", f"s3://{s3.BUCKET}/{made.parent.name}")
    dvc(made, "remote", "modify", "-q", "s3", "endpointurl", storage.endpoint)
    dvc(made, "remote", "modify", "-q", "s3", "verify", "true")
    dvc(made, "add", "-q", "mine")
    dvc(made, "push", "-q")
    return made


def key_of(storage, home, name):
    md5 = md5_of(home / "mine" / name)
    (key,) = (key for key in storage.names(home.parent.name) if key.endswith(f"{md5[:2]}/{md5[2:]}"))
    return key


def test_what_was_pushed_comes_back(home, tmp_path):
    assert Remote(home).faults(content=True) == []
    clone = tmp_path / "clone"
    subprocess.run(["git", "add", "-A"], cwd=home, check=True)
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *who, "commit", "-q", "-m", "data"], cwd=home, check=True)
    subprocess.run(["git", "clone", "-q", str(home), str(clone)], cwd=home, check=True)
    dvc(clone, "pull", "-q")
    assert (clone / "mine" / "weights").read_text() == "many numbers"
    kept = [path for path in home.rglob("*") if path.is_file() and s3.SECRET.encode() in path.read_bytes()]
    assert kept == []


@pytest.mark.parametrize("damage", [False, True])
def test_a_bad_object_is_named_and_mended(storage, home, damage):
    key = key_of(storage, home, "weights")
    if damage:
        storage.client.put_object(Bucket=s3.BUCKET, Key=key, Body=b"rubbish")
    else:
        storage.client.delete_object(Bucket=s3.BUCKET, Key=key)
    remote = Remote(home)
    (fault,) = remote.faults(content=True)
    assert str(fault).startswith("mine/weights (md5 ")
    assert ("damaged" if damage else "missing") in fault.what
    assert remote.mend([fault]) == []
    assert storage.client.get_object(Bucket=s3.BUCKET, Key=key)["Body"].read() == b"many numbers"
    assert Remote(home).faults(content=True) == []


@pytest.fixture
def other(home, tmp_path):
    """A copy whose settings a test may change."""
    return Path(shutil.copytree(home, tmp_path / "other"))


def test_a_bucket_that_is_not_there(other):
    dvc(other, "remote", "modify", "-q", "s3", "url", "s3://no-such-bucket/x")
    said = dvc(other, "push", ok=False)
    assert "bucket" in said.lower()
    assert s3.SECRET not in said
    assert (other / "mine" / "weights").read_text() == "many numbers"


def test_a_storage_that_does_not_answer_is_an_error_that_says_so(other):
    dvc(other, "remote", "modify", "-q", "s3", "endpointurl", "http://127.0.0.1:9")
    dvc(other, "remote", "modify", "-q", "s3", "connect_timeout", "1")
    with pytest.raises(RemoteError, match="cannot be asked"):
        Remote(other).faults(content=False)
