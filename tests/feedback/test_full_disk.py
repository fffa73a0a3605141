"""A disk without space under the running service: annotators are told, and nothing acknowledged is lost."""

from __future__ import annotations

import os
import resource
import subprocess

import httpx
import pytest

from benchmarks.annotators import fields_of, name_of, prepare, secret_of
from feedback.store import Store

from .serving import serving

JSON = {"Accept": "application/json"}


class SmallDisk:
    """A file system of its own, which a file called `ballast` fills to the last byte."""

    def __init__(self, directory):
        self.directory = directory
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(directory)], capture_output=True, text=True
        )
        if made.returncode:
            pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")

    def fill(self, service):
        with (self.directory / "ballast").open("wb", buffering=0) as file:
            try:
                while file.write(b"x" * 4096):
                    pass
            except OSError:
                return

    def make_room(self, service=None):
        (self.directory / "ballast").unlink()

    def reopen(self):
        self.make_room()
        return Store(self.directory / "feedback.db")

    def close(self):
        subprocess.run(["umount", "--lazy", str(self.directory)], check=True)


class SmallFiles:
    """No file of the service may grow beyond what the log of SQLite has now."""

    def __init__(self, directory):
        self.directory = directory

    def fill(self, service):
        size = os.path.getsize(f"{service.database}-wal")
        self._limit(service, size)

    def make_room(self, service):
        self._limit(service, resource.RLIM_INFINITY)

    def reopen(self):
        return Store(self.directory / "feedback.db")

    def _limit(self, service, size):
        resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def close(self):
        pass


@pytest.fixture(params=[SmallDisk, SmallFiles])
def disk(request, tmp_path):
    (tmp_path / "disk").mkdir()
    made = request.param(tmp_path / "disk")
    yield made
    made.close()


def test_a_full_disk_is_told_and_what_was_acknowledged_stays(disk):
    prepare(disk.directory / "feedback.db", 1, 100)
    with serving(disk.directory) as service, httpx.Client(base_url=service.url, timeout=30) as ann:
        ann.post("/login", data={"name": name_of(0), "secret": secret_of(name_of(0))})
        keys = []

        def vote(form, headers=JSON):
            return ann.post("/p/load/vote", data=form | {"choice": "tie"}, headers=headers)

        for _ in range(3):
            form = fields_of(ann.get("/p/load").text)
            keys.append(form["key"])
            assert vote(form).status_code == 200
        form = fields_of(ann.get("/p/load").text)
        disk.fill(service)
        for _ in range(3):
            refused = vote(form)
            assert refused.status_code == 503
            assert "nothing was saved" in refused.json()["error"]
        assert "nothing was saved" in vote(form, headers=None).text  # without the script, a page says it
        assert ann.get("/").status_code == ann.get("/p/load/guidelines").status_code == 200  # reading goes on
        disk.make_room(service)
        assert vote(form).status_code == vote(form).status_code == 200
        keys.append(form["key"])
        form = fields_of(ann.get("/p/load").text)
        disk.fill(service)
        assert vote(form).status_code == 503
        service.kill()  # and it dies with the disk still full
    store = disk.reopen()
    assert [row[0] for row in store.views()["votes"]] == sorted(keys)
    before = store.views()
    store.rebuild()
    assert store.views() == before
    store.close()
