"""One lock for everything that a checkout does one at a time."""

from __future__ import annotations

import threading

import pytest

from tasks.workspace import BusyError, exclusive, held


def test_locks_of_other_names_and_of_other_checkouts_are_free(tmp_path):
    with held(tmp_path, "one", "one is going on"), held(tmp_path, "two", "two is going on"):
        with held(tmp_path / "other", "one", "one is going on"), exclusive(tmp_path):
            pass
        with pytest.raises(BusyError, match=r"one is going on \(process \d+\); wait for it, or stop it"):
            held(tmp_path, "one", "one is going on").__enter__()


def test_who_waits_is_told_once_and_goes_on(tmp_path):
    said, told = [], threading.Event()

    def wait():
        with held(tmp_path, "lock", "it is going on", lambda line: (said.append(line), told.set())):
            said.append("mine")

    other = threading.Thread(target=wait)
    with held(tmp_path, "lock", "it is going on"):
        other.start()
        assert told.wait(60)
        assert "mine" not in said
    other.join(60)
    assert len(said) == 2
    assert said[1] == "mine"
