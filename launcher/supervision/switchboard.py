"""The launcher's end of the connections to the keepers of all ranks."""

from __future__ import annotations

import hmac
import secrets
import selectors
import socket
import time
from pathlib import Path

import psutil

from ...trainer.keeper.wire import BEAT_SECONDS, Wire, Word, leave_word


class Switchboard:
    """Hears the keepers.

    Attributes:
        lines: the connection of each rank that has greeted.
    """

    def __init__(self, folder: Path, remote: bool) -> None:
        """Begins to listen: on this machine alone, or for the ranks of other hosts too."""
        self.lines: dict[int, Wire] = {}
        self._token = secrets.token_hex(16)
        self._strangers: list[Wire] = []
        self._listener = _listener(remote)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._spoken = 0.0
        leave_word(folder, own_addresses() if remote else ["127.0.0.1"], self._listener.getsockname()[1], self._token)

    def poll(self, seconds: float) -> list[tuple[int, Word]]:
        """Waits for that long at most; what has been said since, with the rank of each: a greeting, or another word."""
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._listener:
                self._accept()
        if time.monotonic() - self._spoken >= BEAT_SECONDS:
            self._spoken = time.monotonic()
            self.tell("beat")
        heard = self._greetings()
        for rank, wire in self.lines.items():
            heard += [(rank, message) for message in wire.receive()]
            if wire.closed and wire in self._watched():
                self._selector.unregister(wire)
        return heard

    def tell(self, word: str) -> None:
        """Says it to every rank."""
        for wire in self.lines.values():
            wire.send(word)

    def close(self) -> None:
        for wire in (*self.lines.values(), *self._strangers):
            wire.close()
        self._selector.close()
        self._listener.close()

    def _watched(self) -> set:
        return {key.fileobj for key in self._selector.get_map().values()}

    def _accept(self) -> None:
        wire = Wire(self._listener.accept()[0])
        self._strangers.append(wire)
        self._selector.register(wire, selectors.EVENT_READ)

    def _greetings(self) -> list[tuple[int, Word]]:
        heard = []
        for wire in list(self._strangers):
            for message in wire.receive()[:1]:
                self._strangers.remove(wire)
                if hmac.compare_digest(str(message.get("token")), self._token):
                    wire.send("welcome")
                    self.lines[message["rank"]] = wire
                    heard.append((message["rank"], message))
                else:
                    wire.closed = True
            if wire.closed and wire in self._watched():
                self._selector.unregister(wire)
                wire.close()
                if wire in self._strangers:
                    self._strangers.remove(wire)
        return heard


def _listener(remote: bool) -> socket.socket:
    if not remote:
        return socket.create_server(("127.0.0.1", 0), backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def own_addresses() -> list[str]:
    """Where this machine can be reached, by any of its interfaces that is up; the loopback last."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = []
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            link_local = address.address.startswith("fe80")
            if name in up and address.family in (socket.AF_INET, socket.AF_INET6) and not link_local:
                found.append(address.address)
    return sorted(found, key=lambda address: address in ("127.0.0.1", "::1"))
