"""What keepers and the launcher say to each other: JSON objects, one a line, over a TCP connection that each rank's
keeper opens to the launcher.

The launch's own folder, on storage that all hosts share and that only the user can read, tells where the launcher
listens and what to greet it with; so any way to start ranks will do.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LAUNCH_FOLDER = "ZEROPIPE_LAUNCH"  # set by `zeropipe launch`: a folder of this launch alone, seen by every rank
BEAT_SECONDS = 0.5  # each end says something that often
SILENCE_SECONDS = 6.0  # an end that has said nothing for so long is gone
_WHERE = "launcher.json"
_CONNECT_SECONDS = 3.0
_WAIT_SECONDS = 10.0  # for the folder to be seen here

Word = dict[str, Any]


class Wire:
    """One end of a connection. Nothing blocks: what cannot be sent yet waits for the next call.

    Attributes:
        closed: whether the other end has gone; what it said before is still received.
        heard: when it last said something, by time.monotonic.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.closed, self.heard = False, time.monotonic()
        self._socket, self._in, self._out = connection, b"", b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, word: str, **content: Any) -> None:
        self._out += json.dumps({"word": word, **content}).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        try:
            while self._out:
                self._out = self._out[self._socket.send(self._out) :]
        except BlockingIOError:
            pass
        except OSError:
            self.closed, self._out = True, b""

    def receive(self) -> list[Word]:
        """All messages that have come whole."""
        self.flush()
        try:
            while data := self._socket.recv(1 << 16):
                self._in += data
            self.closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        *lines, self._in = self._in.split(b"\n")
        if lines:
            self.heard = time.monotonic()
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        self._socket.close()


def leave_word(folder: Path, addresses: Sequence[str], port: int, token: str) -> None:
    """Leaves word for the keepers where the launcher listens. For the user's eyes only."""
    text = json.dumps({"addresses": list(addresses), "port": port, "token": token})
    being_written = folder / f"{_WHERE}.new"
    with open(os.open(being_written, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
        file.write(text)
    being_written.rename(folder / _WHERE)


def dial(folder: Path, greeting: Mapping[str, Any]) -> Wire:
    """The connection of a keeper to the launcher, which has welcomed it.

    Raises:
        OSError: the launcher cannot be reached from this host, by any of its addresses.
    """
    deadline = time.monotonic() + _WAIT_SECONDS
    while not (folder / _WHERE).exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    where = json.loads((folder / _WHERE).read_text(encoding="ascii"))
    failures = []
    for address in where["addresses"]:
        try:
            return _greeted(address, where["port"], {"token": where["token"], **greeting})
        except (OSError, ValueError) as error:
            failures.append(f"{address}: {error}")
    raise OSError(f"no answer on port {where['port']} ({'; '.join(failures)})")


def _greeted(address: str, port: int, greeting: Mapping[str, Any]) -> Wire:
    connection = socket.create_connection((address, port), _CONNECT_SECONDS)
    wire = Wire(connection)
    wire.send("hello", **greeting)
    deadline = time.monotonic() + _CONNECT_SECONDS
    while not wire.closed and time.monotonic() < deadline:
        if any(message["word"] == "welcome" for message in wire.receive()):
            return wire
        time.sleep(0.01)
    wire.close()
    raise OSError("something else listens there")
