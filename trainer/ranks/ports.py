"""A port for the ranks of one machine to meet on."""

from __future__ import annotations

import contextlib
import secrets
import socket

FIRST, LAST = 15_000, 32_000  # the kernel hands out 32,768 and up: a connection of someone else would take it meanwhile


def free_port() -> int:
    """A free port of this machine, drawn at random, so that two launches at one moment hardly ever get the same."""
    while True:
        port = FIRST + secrets.randbelow(LAST - FIRST)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
