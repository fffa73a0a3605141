"""A process that ends with the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def die_with_parent(first: int) -> None:
    """Get SIGTERM when the parent dies, also by SIGKILL, so that no training goes on unseen (Linux).

    `first` is the process that started the parent, or the parent itself. A parent that died before this sends
    nothing, and seconds lie between, in which Python starts: where `first` is gone, SIGTERM comes at once.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:  # inherited; nobody would see the signal
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != first and _is_gone(first):
            os.kill(os.getpid(), signal.SIGTERM)


def _is_gone(pid: int) -> bool:
    """Also of one that has ended and whose parent has not asked how."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"
