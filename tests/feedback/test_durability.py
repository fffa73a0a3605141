"""A killed service loses nothing that it acknowledged; many annotators at once get on."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from feedback.store import Store

from .conftest import pairs, person
from .serving import Serving, Voter


def prepare(directory, num_people, num_items):
    store = Store(directory / "feedback.db")
    pairs(store, num_items, overlap_votes=2, overlap_share=0.5)
    names = [f"person {n}" for n in range(num_people)]
    for name in names:
        person(store, name)
    store.close()
    return names


def standing(directory):
    store = Store(directory / "feedback.db")
    rows = [row for row in store.views()["votes"] if not row[-1]]
    before = store.views()
    store.rebuild()
    assert store.views() == before
    store.close()
    return rows


def vote_until_it_dies(url, name, acknowledged, enough):
    try:
        voter = Voter(url, name)
        while key := voter.vote("p", "0:1"):
            acknowledged.append(key)
            if len(acknowledged) >= 15:
                enough.set()
    except (httpx.HTTPError, AssertionError):
        return


@pytest.mark.parametrize("rounds", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_every_acknowledged_vote_outlives_a_kill_under_load(tmp_path, rounds):
    names = prepare(tmp_path, 4, 400)
    kept = []
    for _ in range(rounds):
        service = Serving(tmp_path)
        acknowledged, enough = [], threading.Event()
        threads = [
            threading.Thread(target=vote_until_it_dies, args=(service.url, name, acknowledged, enough))
            for name in names
        ]
        for thread in threads:
            thread.start()
        assert enough.wait(120)
        service.kill()
        for thread in threads:
            thread.join()
        kept += acknowledged
        found = [row[0] for row in standing(tmp_path)]
        assert set(kept) <= set(found)
        assert len(found) == len(set(found)) <= len(kept) + rounds * len(names)  # those on their way


@pytest.mark.slow
def test_fifty_annotators_at_once_get_on_and_each_vote_counts_once(tmp_path, capsys):
    names = prepare(tmp_path, 50, 600)
    service = Serving(tmp_path)
    waits, lock = [], threading.Lock()

    def work(name):
        voter, keys = Voter(service.url, name), []
        for _ in range(10):
            began = time.perf_counter()
            keys.append(voter.vote("p", "1:2"))
            with lock:
                waits.append(time.perf_counter() - began)
        return keys

    try:
        with ThreadPoolExecutor(50) as pool:
            keys = [key for each in pool.map(work, names) for key in each]
    finally:
        service.stop()
    assert sorted(row[0] for row in standing(tmp_path)) == sorted(keys)
    assert len(set(keys)) == 500
    waits.sort()
    with capsys.disabled():
        half, most = waits[len(waits) // 2], waits[int(len(waits) * 0.95)]
        print(f"\n50 annotators, page and vote: median {half:.2f} s, 95 % within {most:.2f} s")
