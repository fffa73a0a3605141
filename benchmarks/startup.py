"""What it costs to begin: `python -m benchmarks.startup` (`rlhf bench startup`). Needs data/prepared."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from rich.console import Console
from rich.table import Table

from benchmarks.speed import measure

COMMANDS = {
    "python, nothing imported": [sys.executable, "-c", ""],
    "import rlhf_core": [sys.executable, "-c", "import rlhf_core"],
    "rlhf --help": [sys.executable, "-m", "rlhf_core.cli", "--help"],
    "a stage that is up to date": [sys.executable, "-m", "dvc", "repro", "--single-item", "prepare"],
}


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, check=True)
    if "repro" in command and b"didn't change, skipping" not in done.stdout:
        sys.exit("the stage prepare is not up to date: `dvc repro prepare` first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    found = measure({name: lambda c=c: run(c) for name, c in COMMANDS.items()}, options.repeats)
    table = Table("command", "seconds (range)", title="Start-up")
    for name, seconds in found.items():
        table.add_row(name, f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})")
    Console().print(table)


if __name__ == "__main__":
    main()
