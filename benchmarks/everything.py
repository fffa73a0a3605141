"""All benchmarks one after another, each printing its tables: `rlhf bench all` (`make bench`).

About an hour on two cores, most of it the peers' batches.
"""

from __future__ import annotations

import subprocess
import sys

import torch

from rlhf_core.cli import BENCHMARKS


def main() -> None:
    failed = []
    for part, module in BENCHMARKS.items():
        if part == "all" or (part == "gpu" and not torch.cuda.is_available()):
            continue
        print(f"\nrlhf bench {part}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{module}"], check=False).returncode:
            failed.append(part)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
