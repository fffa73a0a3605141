import multiprocessing
import shutil
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.mlflow_writer import experiment_id, open_client
from tasks.ledger import PROMOTE, REJECT, ROLLBACK, Entry, Ledger, replay

NAME = "toy-policy"


def entry(number, kind, base, promotion="", was="", version=""):
    return Entry(number, kind, base, promotion or f"run{number}", was, version, "ann", "why", "now")


def test_replay_by_hand():
    history = [
        entry(1, PROMOTE, 0, version="1"),
        entry(2, PROMOTE, 1, was="1", version="2"),
        entry(3, PROMOTE, 1, was="1", version="3"),  # was compared with 1, which is champion no more
        entry(4, REJECT, 2, version="4"),  # moves nothing
        entry(5, PROMOTE, 2, was="2", version="5"),
    ]
    standing = replay(history)
    assert standing.void == {3}
    assert (standing.head, standing.champions) == (5, ("1", "2", "5"))
    assert (standing.champion, standing.previous) == ("5", "2")
    back = replay([*history, entry(6, ROLLBACK, 5, was="5", version="2")])
    assert (back.champion, back.previous) == ("2", "1")
    twice = replay([*history, entry(6, ROLLBACK, 5, was="5"), entry(7, ROLLBACK, 6, was="2")])
    assert (twice.champion, twice.previous) == ("1", "")


def test_an_alias_set_by_hand_is_what_the_next_decision_starts_from():
    standing = replay([entry(1, PROMOTE, 0, version="1"), entry(2, PROMOTE, 1, was="9", version="2")])
    assert standing.champions == ("1", "9", "2")
    back = replay([entry(1, PROMOTE, 0, version="1"), entry(2, ROLLBACK, 1, was="9")])
    assert back.champion == "1"


def test_a_champion_that_lost_its_alias_by_hand_is_not_its_own_predecessor():
    history = [entry(1, PROMOTE, 0, version="1"), entry(2, PROMOTE, 1, was="", version="1")]
    assert replay(history).champions == ("1",)


def test_a_promotion_is_decided_once():
    standing = replay(
        [
            entry(1, REJECT, 0, promotion="a", version="1"),
            entry(2, PROMOTE, 0, promotion="a", version="1"),
            entry(3, PROMOTE, 0, promotion="b", version="2"),
        ]
    )
    assert standing.void == {2}
    assert standing.decided["a"].kind == REJECT
    assert standing.champion == "2"


ENTRIES = st.lists(
    st.tuples(st.sampled_from([PROMOTE, REJECT, ROLLBACK]), st.integers(0, 12), st.integers(0, 5)),
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(ENTRIES, st.randoms())
def test_no_two_decisions_on_one_head_count_and_order_of_reading_does_not_matter(drawn, random):
    history = [entry(i + 1, kind, base, f"p{p}", version=str(p)) for i, (kind, base, p) in enumerate(drawn)]
    standing = replay(history)
    moves = [e for e in standing.decided.values() if e.kind != REJECT]
    assert len({e.base for e in moves}) == len(moves)
    assert len(standing.void) + len(standing.decided) == len(history)
    shuffled = list(history)
    random.shuffle(shuffled)
    assert replay(shuffled) == standing
    # What was decided once stays decided, whatever is written later.
    for cut in range(len(history)):
        before = replay(history[:cut])
        assert before.void <= standing.void
        assert before.decided.items() <= standing.decided.items()


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """An empty store of MLflow: to make its tables takes seconds."""
    root = tmp_path_factory.mktemp("tables")
    open_client(root)
    return root


@pytest.fixture
def store(tables, tmp_path, monkeypatch):
    """A registry of a model with four versions, in SQLite below a workspace."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copytree(tables, tmp_path, dirs_exist_ok=True)
    client = open_client(tmp_path)
    run = client.create_run(experiment_id(client, tmp_path))
    client.create_registered_model(NAME)
    for _ in range(4):
        client.create_model_version(NAME, run.info.artifact_uri, run_id=run.info.run_id)
    return tmp_path, client, run.info


def write(ledger, info, kind, base, version, promotion, was=""):
    return ledger.append(
        run_id=info.run_id,
        source=info.artifact_uri,
        kind=kind,
        base=str(base),
        promotion=promotion,
        was=was,
        version=version,
        by="ann",
        reason="why",
    )


def test_aliases_follow_the_ledger(store):
    _, client, info = store
    ledger = Ledger(client, NAME)
    assert ledger.settle().head == 0
    write(ledger, info, PROMOTE, 0, "1", "a")
    ledger.apply()
    assert ledger.aliases() == {"champion": "1"}
    write(ledger, info, PROMOTE, 1, "2", "b", was="1")
    ledger.apply()
    assert ledger.aliases() == {"champion": "2", "previous": "1"}
    write(ledger, info, ROLLBACK, 2, "1", "c", was="2")
    ledger.apply()
    assert ledger.aliases() == {"champion": "1"}


def test_who_dies_before_moving_the_aliases_leaves_that_to_the_next(store):
    root, client, info = store
    write(Ledger(client, NAME), info, PROMOTE, 0, "1", "a")  # and here the process is killed
    other = Ledger(open_client(root), NAME)
    assert other.aliases() == {}
    assert other.settle().champion == "1"
    assert other.aliases() == {"champion": "1"}


def test_settling_leaves_an_alias_that_was_set_by_hand(store):
    _, client, info = store
    ledger = Ledger(client, NAME)
    write(ledger, info, PROMOTE, 0, "1", "a")
    ledger.apply()
    client.set_registered_model_alias(NAME, "champion", "4")
    ledger.settle()
    assert ledger.aliases()["champion"] == "4"


def race(root, run_id, artifact_uri, number, barrier, results):
    """Two processes decide on the same head at the same moment."""
    client = open_client(root)
    ledger = Ledger(client, NAME)
    barrier.wait(60)
    mine = ledger.append(
        run_id=run_id,
        source=artifact_uri,
        kind=PROMOTE,
        base="0",
        promotion=f"p{number}",
        was="",
        version=str(number),
        by=f"person {number}",
        reason="why",
    )
    standing = ledger.standing()
    won = mine not in standing.void
    if won:
        ledger.apply()
    results.put((number, won))


def test_of_processes_that_promote_at_once_exactly_one_wins(store):
    root, client, info = store
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    workers = [
        context.Process(target=race, args=(root, info.run_id, info.artifact_uri, n, barrier, results))
        for n in (1, 2, 3)
    ]
    for worker in workers:
        worker.start()
    found = dict(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    (winner,) = (number for number, won in found.items() if won)
    ledger = Ledger(client, NAME)
    assert ledger.aliases() == {"champion": str(winner)}
    assert len(ledger.entries()) == 3
    assert len(ledger.standing().void) == 2


def test_a_late_writer_of_aliases_does_not_undo_a_newer_decision(store, monkeypatch):
    root, client, info = store
    slow = Ledger(client, NAME)
    write(slow, info, PROMOTE, 0, "1", "a")
    reached, go_on = threading.Event(), threading.Event()
    real = slow._set

    def waiting(alias, version):
        if alias == "champion" and version == "1" and not reached.is_set():
            reached.set()
            go_on.wait(30)
        real(alias, version)

    monkeypatch.setattr(slow, "_set", waiting)
    thread = threading.Thread(target=slow.apply)
    thread.start()
    assert reached.wait(30)
    fast = Ledger(open_client(root), NAME)
    write(fast, info, PROMOTE, 1, "2", "b", was="1")
    fast.apply()
    go_on.set()
    thread.join(30)
    assert fast.aliases() == {"champion": "2", "previous": "1"}
