"""Run a function in the two ranks of a training that talk by gloo."""

from __future__ import annotations

import os

import torch
from torch import multiprocessing

from rlhf_core import ranks
from rlhf_core.ports import unused_port


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
    port = unused_port()
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    processes = [context.Process(target=_as_rank, args=(r, port, work, answers)) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [answer for _, answer in sorted(answers.get() for _ in processes)]
