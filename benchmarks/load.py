"""Fifty annotators at once: `python -m benchmarks.load` (`rlhf bench feedback`).

The real service in a process of its own, on a database of its own, and as many clients as annotators. Says
how long a vote takes, and ends with status 1 when a vote was lost, doubled or changed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from benchmarks.annotators import Annotators, Habits, Outcome, faults, prepare
from feedback.store import Store
from tasks.network import free_port


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all do not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


@contextlib.contextmanager
def serving(database: Path, port: int) -> Iterator[None]:
    """`rlhf feedback serve` for the block, in which it answers."""
    command = [
        sys.executable,
        "-m",
        "feedback.cli",
        "serve",
        "--database",
        str(database),
        "--port",
        str(port),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(command, cwd=database.parent, env=environment, stdout=subprocess.DEVNULL)
    try:
        wait_for(process, f"http://127.0.0.1:{port}/health")
        yield
    finally:
        process.terminate()
        process.wait()


def wait_for(process: subprocess.Popen[bytes], url: str) -> None:
    """Raises RuntimeError when it ends, or takes longer than a minute, before it answers."""
    until = time.monotonic() + 60.0
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=2.0).status_code == 200:
                return
        time.sleep(0.05)
    raise RuntimeError("the service did not start")


def measure(directory: Path, args: argparse.Namespace) -> tuple[Outcome, list[str], float]:
    """The outcome, what is wrong with the store, and the seconds between."""
    database, port = directory / "feedback.db", free_port(18600)
    habits = Habits(pause=args.pause)
    prepare(database, args.annotators, args.items, overlap_votes=3, overlap_share=0.2)
    with serving(database, port):
        annotators = Annotators(f"http://127.0.0.1:{port}", args.annotators, habits)
        try:
            annotators.wait_for_votes(args.annotators)  # all are signed in
            annotators.outcome.vote_seconds.clear()
            annotators.outcome.page_seconds.clear()
            began = time.monotonic()
            time.sleep(args.minutes * 60.0)
            seconds = time.monotonic() - began
        finally:
            outcome = annotators.finish()  # else their threads would go on
    store = Store(database)
    wrong = faults(store, outcome)
    store.close()
    return outcome, wrong, seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="rlhf bench feedback", description=__doc__)
    parser.add_argument("--annotators", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--pause", type=float, default=2.0, help="mean seconds with an item; 0: none")
    parser.add_argument("--items", type=int, default=5000)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it unwinds like Ctrl-C, so the service ends
    with tempfile.TemporaryDirectory() as directory:
        outcome, wrong, seconds = measure(Path(directory), args)
    given = len(outcome.vote_seconds)
    print(
        f"{args.annotators} annotators, {seconds / 60:.1f} min, {given} votes, {given / seconds:.1f} a second"
    )
    for name, values in (("vote", outcome.vote_seconds), ("page", outcome.page_seconds)):
        half, most, worst = (1000 * percentile(values, share) for share in (0.5, 0.95, 0.99))
        longest = 1000 * max(values)
        print(f"{name}: median {half:.0f} ms, p95 {most:.0f}, p99 {worst:.0f}, longest {longest:.0f}")
    print("sent again: " + (", ".join(f"{n} x {why}" for why, n in outcome.retries.items()) or "nothing"))
    for sentence in wrong[:20]:
        print(f"wrong: {sentence}")
    print(
        "no vote lost, doubled or changed, no item in too many hands" if not wrong else f"{len(wrong)} faults"
    )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
