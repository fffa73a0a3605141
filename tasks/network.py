"""Ports and servers of this machine."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request

from rlhf_core.errors import RLHFError

HOST = "127.0.0.1"
ANSWER_SECONDS = 3.0


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def free_port(wanted: int) -> int:
    """`wanted`, or the next port that nobody listens on."""
    for port in range(wanted, wanted + 100):
        if port_is_free(port):
            return port
    raise RLHFError(f"no free port from {wanted} to {wanted + 99} on {HOST}")


def answers(url: str) -> bool:
    """Whether a server is there; one that asks who we are is."""
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as reply:
            return reply.status == 200
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except (OSError, ValueError):
        return False
