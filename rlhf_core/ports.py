"""Ports of this machine for servers of our own."""

from __future__ import annotations

import socket

HOST = "127.0.0.1"


def unused_port() -> int:
    """One that the kernel picks, so that two who ask at the same time hardly get the same."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
