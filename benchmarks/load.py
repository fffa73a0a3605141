"""Fifty annotators at once: `python -m benchmarks.load` (`rlhf bench feedback`).

The real service in a process of its own, on a database of its own, and as many clients as annotators. Says
how long a vote takes, and ends with status 1 when a vote was lost, doubled or changed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from benchmarks.annotators import Annotators, Habits, Outcome, faults, prepare
from feedback.store import Store
from tasks.network import free_port


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all do not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


def serve(database: Path, port: int) -> subprocess.Popen[bytes]:
    """`rlhf feedback serve`, answering when this returns."""
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
    until = time.monotonic() + 60.0
    while True:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2.0).status_code == 200:
                return process
        except httpx.TransportError:
            pass
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            raise RuntimeError("the service did not start")
        time.sleep(0.05)


def measure(directory: Path, args: argparse.Namespace) -> tuple[Outcome, list[str], float]:
    """The outcome, what is wrong with the store, and the seconds between."""
    database, port = directory / "feedback.db", free_port(18600)
    habits = Habits(pause=args.pause)
    prepare(database, args.annotators, args.items, overlap_votes=3, overlap_share=0.2)
    process = serve(database, port)
    try:
        annotators = Annotators(f"http://127.0.0.1:{port}", args.annotators, habits)
        annotators.wait_for_votes(args.annotators)  # all are signed in
        annotators.outcome.vote_seconds.clear()
        annotators.outcome.page_seconds.clear()
        began = time.monotonic()
        time.sleep(args.minutes * 60.0)
        seconds = time.monotonic() - began
        outcome = annotators.finish()
    finally:
        process.terminate()
        process.wait()
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
