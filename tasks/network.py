"""Ports and servers of this machine."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request

from rlhf_core.errors import InputError, RLHFError
from rlhf_core.ports import HOST

LOOPBACK = (HOST, "localhost", "::1")
ANSWER_SECONDS = 3.0


def port_is_free(port: int, host: str = HOST) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_port(wanted: int, host: str = HOST) -> int:
    """`wanted`, or the next port that nobody listens on.

    Raises InputError for an address that is not this machine's, RLHFError when none is free.
    """
    if not port_is_free(0, host):
        raise InputError(f"--host {host}: not an address of this machine")
    for port in range(wanted, wanted + 100):
        if port_is_free(port, host):
            return port
    raise RLHFError(f"no free port from {wanted} to {wanted + 99} on {host}")


def answers(url: str) -> bool:
    """Whether a server is there; one that asks who we are is."""
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as reply:
            return reply.status == 200
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except (OSError, ValueError):
        return False
