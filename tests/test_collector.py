"""When Python's garbage collector rests."""

from __future__ import annotations

import gc

import pytest

from rlhf_core import collector


@pytest.fixture(autouse=True)
def collecting():
    gc.enable()
    yield
    gc.enable()
    gc.unfreeze()


def test_it_rests_within_and_goes_on_after_also_after_an_error():
    with collector.paused(), collector.paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), collector.paused():
        raise KeyError
    assert gc.isenabled()


def test_one_that_was_off_stays_off():
    gc.disable()
    with collector.paused():
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_what_is_left_to_the_process_is_not_looked_through_again():
    before = gc.get_freeze_count()
    collector.leave_all()
    assert gc.get_freeze_count() > before + 1000
