"""The chat endpoint: tokens a second of streams at once beside one after the other (`rlhf bench serving`).

A real server and its clients in one process, the two cases alternating, since only ratios mean anything on a
shared machine. Needs models/base, or `--model DIRECTORY`.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx
import uvicorn

from benchmarks.speed import QUESTIONS
from rlhf_core.config import RunConfig
from rlhf_core.layout import Layout
from serving.app import create_app
from serving.fleet import Fleet
from serving.models import Capacity
from serving.registry import DirectorySource
from serving.service import Limits, Service
from serving.watch import Watcher


class Stream(NamedTuple):
    """One answer: its tokens, and the seconds to its first piece of text."""

    tokens: int
    first: float


def ask(client: httpx.Client, number: int, max_tokens: int) -> Stream:
    body = {
        "messages": [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}],
        "max_tokens": max_tokens,
        "temperature": 1.0,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started, first, tokens = time.perf_counter(), 0.0, 0
    with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                first = first or time.perf_counter() - started
            if chunk["usage"]:
                tokens = chunk["usage"]["completion_tokens"]
    return Stream(tokens, first)


def measure(client: httpx.Client, streams: int, at_once: int, max_tokens: int) -> tuple[float, float]:
    """Tokens a second of all together, and the median seconds to the first piece."""
    started = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        found = list(pool.map(lambda number: ask(client, number, max_tokens), range(streams)))
    seconds = time.perf_counter() - started
    return sum(one.tokens for one in found) / seconds, statistics.median(one.first for one in found)


def main() -> None:
    parser = argparse.ArgumentParser(prog="rlhf bench serving", description=__doc__)
    parser.add_argument("--model", type=Path, default=Layout.here().model("base"))
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    capacity = Capacity(slots=args.streams)
    source = DirectorySource(args.model, args.model.name, RunConfig.alone(), capacity)
    fleet = Fleet(source.name)
    watcher = Watcher(fleet, source, 60.0)
    watcher.start()
    service = Service(fleet, watcher, Limits(slots=args.streams))
    server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="warning"))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        try:
            with httpx.Client(base_url=address, timeout=600) as client:
                report(client, args)
        finally:
            server.should_exit = True
            thread.join()
            watcher.stop()
            fleet.close()


def report(client: httpx.Client, args: argparse.Namespace) -> None:
    while True:  # until it listens
        try:
            ask(client, 0, 4)
            break
        except httpx.ConnectError:
            time.sleep(0.05)
    cases: dict[int, list[tuple[float, float]]] = {1: [], args.streams: []}
    for _ in range(args.rounds):
        for at_once, found in cases.items():
            found.append(measure(client, args.streams, at_once, args.tokens))
    for at_once, found in cases.items():
        rates, firsts = zip(*found, strict=True)
        each = " ".join(f"{rate:.1f}" for rate in rates)
        print(
            f"{at_once} at once: {statistics.median(rates):.1f} tokens/s (rounds: {each}), "
            f"first piece after {statistics.median(firsts):.3f} s"
        )
    one, many = (statistics.median(rate for rate, _ in found) for found in cases.values())
    print(f"{args.streams} at once / one at a time: {many / one:.2f}")


if __name__ == "__main__":
    main()
