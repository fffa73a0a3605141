"""Start a stage in several processes on this machine, and end them all when one dies."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from rlhf_core.config import RunConfig
from rlhf_core.errors import LostRankError, RLHFError
from rlhf_core.layout import Layout
from rlhf_core.ranks import LAUNCHED

# How a process ends because another one did: it lost the connection, or was told to stop.
CONSEQUENCES = (LostRankError.exit_code, 130, -signal.SIGTERM)


class ProcessDiedError(RLHFError):
    """One of the processes of a stage ended early; the others were stopped."""


def in_processes(stage: str, run: RunConfig, layout: Layout) -> NoReturn:
    """Run `rlhf STAGE` as `run.num_processes` ranks; leaves with the status of the first that failed.

    The first rank prints; the output of the others goes to .rlhf/runs/STAGE/ranks.
    Raises ProcessDiedError when a rank was killed, or failed without a word on the terminal.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    processes = run.num_processes
    os.environ |= LAUNCHED[run.sharding]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ["TORCHELASTIC_ERROR_FILE"] = os.devnull
    logs = layout.run_dir(stage) / "ranks"
    logs.mkdir(parents=True, exist_ok=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=stage,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.5,
        shutdown_timeout=15,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=dict.fromkeys(range(1, processes), Std.ALL)),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "rlhf_core.cli", stage)
    except SignalException:  # Ctrl-C or SIGTERM; the processes are gone
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        failures = {number: f for number, f in error.failures.items() if f.exitcode not in CONSEQUENCES}
        if 0 in failures and failures[0].exitcode > 0:
            sys.exit(failures[0].exitcode)  # it has said why
        number, failure = min(failures.items()) if failures else error.get_first_failure()
        how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"status {failure.exitcode}"
        raise ProcessDiedError(
            f"{stage}: process {number + 1} of {processes} (pid {failure.pid}) ended with {how}; the others "
            f"were stopped. Its output is below {logs}; run the same command again to go on"
        ) from None
    sys.exit(0)
