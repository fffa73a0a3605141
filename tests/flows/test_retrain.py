"""The flow `retrain` at its edges: what it does when there is nothing to do, and in which order it ends."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from flows import retrain as module
from tasks import retraining
from tasks.schedule import Slot


@pytest.fixture
def quiet(monkeypatch, root):
    """The flow's body without a server: what it would have shown, and trained."""
    shown, trained = [], []
    monkeypatch.chdir(root)
    monkeypatch.setattr(module, "get_run_logger", lambda: logging.getLogger("test"))
    monkeypatch.setattr(module, "create_markdown_artifact", lambda text, **_: shown.append(text))
    monkeypatch.setattr(module, "_train", lambda *given: trained.append(given) or "models:/x (version 1)")
    monkeypatch.setattr(retraining, "one_at_a_time", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(module.slots, "seen", lambda: (module.slots.NOBODY, []))
    return SimpleNamespace(shown=shown, trained=trained, patch=monkeypatch)


def votes(count):
    return SimpleNamespace(new=frozenset(map(str, range(count))), since=0)


@pytest.mark.parametrize(
    ("count", "options", "trains"), [(49, {}, False), (50, {}, True), (0, {"force": True}, True)]
)
def test_it_trains_on_enough_new_votes_and_else_says_so_and_ends_well(quiet, count, options, trains):
    quiet.patch.setattr(module, "gather_votes", lambda home, params: votes(count))
    said = module.retrain.fn(**options)
    assert bool(quiet.trained) is trains
    if not trains:
        assert said == f"{count} new votes in all, and retrain.min_votes is 50: nothing to train"
        assert quiet.shown == [said]


def test_labels_of_the_ai_alone_wait_for_no_vote(quiet):
    quiet.patch.setattr(module, "gather_votes", lambda home, params: pytest.fail("no vote is read"))
    module.retrain.fn(overrides=["retrain.labels=ai"])
    ((_, _, _, found),) = quiet.trained
    assert found is None


def test_a_missed_slot_whose_work_is_done_is_skipped_and_completed(quiet):
    from datetime import UTC, datetime

    def moment(hour):
        return datetime(2026, 11, 2, hour, tzinfo=UTC)

    own = Slot("own", moment(1), moment(9), "running")
    other = Slot("other", moment(2), moment(8), "done")
    quiet.patch.setattr(module.slots, "seen", lambda: (own, [own, other]))
    quiet.patch.setattr(module, "gather_votes", lambda home, params: pytest.fail("no vote is read"))
    state = module.retrain.fn()
    assert (state.is_completed(), state.name) == (True, "Skipped")
    assert "run other has done its work" in state.message
    assert not quiet.trained


def test_votes_are_used_up_after_everything_else(monkeypatch, root, tmp_path):
    """Registered and pushed first: whoever dies before the last step takes the same votes again."""
    steps = []
    place = SimpleNamespace(root=root, kept=tmp_path)
    note = lambda name, value=None: lambda *_, **__: steps.append(name) or value  # noqa: E731
    monkeypatch.setattr(module.worktrees, "run_place", lambda *_: contextlib.nullcontext(place))
    monkeypatch.setattr(module.worktrees, "run_id_of", lambda *_: "r")
    monkeypatch.setattr(module.worktrees, "bring_data", note("bring data"))
    monkeypatch.setattr(module.worktrees, "remove", note("remove"))
    monkeypatch.setattr(module.workspace, "resolve_params", lambda *_: module.read_params(root, "", []))
    monkeypatch.setattr(module, "make_dataset", note("data set", {"version": "v"}))
    monkeypatch.setattr(module, "bring_champion", note("champion"))
    monkeypatch.setattr(module.retraining, "lineage", lambda *_: {"feedback.version": "v"})
    monkeypatch.setattr(module.retraining, "values_for", lambda *_: {})
    monkeypatch.setattr(module, "change_params", lambda *_: module.read_params(root, "", []))
    monkeypatch.setattr(module, "gpus_for", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(module, "run_stages", note("train and register", "models:/x (version 3)"))
    monkeypatch.setattr(module, "push", note("push"))
    monkeypatch.setattr(module, "mark_used", note("votes are used"))
    module._train(Path("."), "", [], votes(60))
    assert steps == [
        "bring data",
        "data set",
        "champion",
        "train and register",
        "push",
        "votes are used",
        "remove",
    ]
