"""What processes of one training do together, in two real ones."""

from __future__ import annotations

import os
import socket

import pytest
import torch
from torch import multiprocessing

from rlhf_core import ranks


def _as_rank(rank, port, work, answers):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    ranks.join(torch.device("cpu"))
    with ranks.together():
        answers.put((rank, work(rank)))


def in_two_processes(work):
    """What `work(rank)` gives in the two ranks of a training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    processes = [context.Process(target=_as_rank, args=(r, port, work, answers)) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [answer for _, answer in sorted(answers.get() for _ in processes)]


def _what_only_the_first_says(rank):
    return ranks.agree(rank == 0), ranks.agree(rank == 1)


@pytest.mark.timeout(120)
def test_what_the_first_rank_says_holds_for_all():
    assert in_two_processes(_what_only_the_first_says) == [(True, False), (True, False)]


def test_one_process_agrees_with_itself():
    assert ranks.agree(True)
    assert not ranks.agree(False)
