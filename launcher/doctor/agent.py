"""`python -m zeropipe.launcher.doctor.agent`: answers the doctor on one host, one JSON line for each that it reads.

It ends, with all that it has started, when its input does: one ssh command a host, and nothing is left behind.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from ...data_prep.lock import lock_file
from ...trainer.ranks.interface import own_address
from ...trainer.ranks.ports import free_port
from . import probe

REPLY = "zeropipe-doctor "  # a login shell may say other things


class Agent:
    """What the doctor may ask. Methods take and return plain values; sockets, locks and ranks last until the end."""

    def __init__(self) -> None:
        self._listeners: list[socket.socket] = []
        self._locks: list[IO[str]] = []
        self._ranks: list[subprocess.Popen[str]] = []

    def facts(self, files: list[str], output: str) -> dict[str, Any]:
        return probe.facts(files, output)

    def clock(self) -> float:
        return time.time()

    def token(self, folder: str, name: str, text: str) -> None:
        probe.leave_token(f"{folder}/token-{name}", text)

    def tokens(self, folder: str) -> dict[str, str]:
        return probe.read_tokens(folder)

    def lock(self, path: str) -> None:
        self._locks.append(lock_file(Path(path)))

    def locked(self, path: str) -> bool:
        return probe.locked_elsewhere(path)

    def listen(self, port: int | None = None) -> int:
        """Opens a port, on all interfaces, until `hush`. Connections wait in the queue and are never taken up."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", port or free_port()))
        listener.listen(4096)
        self._listeners.append(listener)
        return listener.getsockname()[1]

    def hush(self) -> None:
        while self._listeners:
            self._listeners.pop().close()

    def reach(self, targets: list[list[Any]], seconds: float) -> list[float | None]:
        """Seconds that a connection to each (address, port) takes; None where there is none."""
        with ThreadPoolExecutor(min(64, max(1, len(targets)))) as pool:
            return list(pool.map(lambda target: _connect(target[0], target[1], seconds), targets))

    def own_address(self, target: str) -> str | None:
        return own_address(target)

    def start_ranks(self, count: int, environment: dict[str, str]) -> None:
        """Starts ranks that load torch meanwhile; they begin with `all_reduce`."""
        words = [sys.executable, "-m", f"{__package__}.exchange"]
        for _ in range(count):
            rank = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env={**os.environ, **environment},
            )  # fmt: skip
            self._ranks.append(rank)

    def all_reduce(self, places: list[dict[str, str]], seconds: float) -> list[dict[str, Any]]:
        """What every rank of this host has measured: its values, or `error`. `places`: torchrun's variables of each."""
        for rank, place in zip(self._ranks, places, strict=True):
            assert rank.stdin is not None
            rank.stdin.write(json.dumps(place) + "\n")
            rank.stdin.flush()
        deadline = time.monotonic() + seconds
        return [_measured(rank, deadline) for rank in self._ranks]

    def close(self) -> None:
        for rank in self._ranks:
            rank.kill()


def _connect(address: str, port: int, seconds: float) -> float | None:
    began = time.monotonic()
    try:
        socket.create_connection((address, port), seconds).close()
    except OSError:
        return None
    return time.monotonic() - began


def _measured(rank: subprocess.Popen[str], deadline: float) -> dict[str, Any]:
    try:
        said, problems = rank.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return {"error": "no answer: it still waits for the others"}
    lines = [line for line in said.splitlines() if line.startswith(REPLY)]
    if rank.returncode or not lines:
        return {"error": (problems.strip().splitlines() or [f"it ended with {rank.returncode}"])[-1]}
    return json.loads(lines[-1].removeprefix(REPLY))


def main() -> None:
    agent = Agent()
    try:
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = {"value": getattr(agent, request["do"])(**request["with"])}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(REPLY + json.dumps(answer), flush=True)
    finally:
        agent.close()


if __name__ == "__main__":
    main()
