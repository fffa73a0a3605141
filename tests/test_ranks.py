"""What processes of one training do together, in two real ones."""

from __future__ import annotations

import pytest

from rlhf_core import ranks

from .two_processes import in_two_processes


def _what_only_the_first_says(rank):
    return ranks.agree(rank == 0), ranks.agree(rank == 1)


@pytest.mark.timeout(120)
def test_what_the_first_rank_says_holds_for_all():
    assert in_two_processes(_what_only_the_first_says) == [(True, False), (True, False)]


def test_one_process_agrees_with_itself():
    assert ranks.agree(True)
    assert not ranks.agree(False)
