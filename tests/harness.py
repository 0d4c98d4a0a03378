"""Runs a function on real gloo ranks, each a fresh process forked from a server that has already imported torch."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


def free_port() -> int:
    """A port below those that the kernel hands out (32,768 and up): connections of others would take it meanwhile."""
    while True:
        port = 15_000 + secrets.randbelow(17_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def run_ranks(world: int, target: Callable[..., Any], *args: Any, timeout: float = 180) -> list[Any]:
    """Calls `target(*args)` on `world` ranks and returns what each returned (picklable), in rank order.

    `target` is a module-level function; it joins the group itself (`init_distributed`). The first rank that raises
    fails the test with its traceback; a hang is killed after `timeout` seconds and fails with the ranks that hung.
    """
    group = RankGroup(world, target, *args)
    try:
        return group.results(timeout)
    finally:
        group.kill(grace=5)


class RankGroup:
    """Ranks under way, for tests that interfere with them."""

    def __init__(self, world: int, target: Callable[..., Any], *args: Any) -> None:
        self.pipes: list[Connection] = []
        self.processes = []
        port = free_port()
        for rank in range(world):
            receiver, sender = _context.Pipe(duplex=False)
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            process = _context.Process(target=_rank, args=(sender, environment, target, args), daemon=True)
            process.start()
            sender.close()
            self.pipes.append(receiver)
            self.processes.append(process)

    def results(self, timeout: float = 180) -> list[Any]:
        """What each rank returned; AssertionError with the first failure, or the ranks that hung."""
        deadline, found = time.monotonic() + timeout, {}
        while len(found) < len(self.pipes):
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in found]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                hung = [rank for rank in range(len(self.pipes)) if rank not in found]
                raise AssertionError(f"ranks {hung} of {len(self.pipes)} did not finish within {timeout:.0f} s")
            for pipe in ready:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                found[rank] = self._receive(rank)
        return [found[rank] for rank in range(len(self.pipes))]

    def _receive(self, rank: int) -> Any:
        try:
            failed, value = self.pipes[rank].recv()
        except EOFError:
            raise AssertionError(f"rank {rank} of {len(self.pipes)} died without a word") from None
        if failed:
            raise AssertionError(f"rank {rank} of {len(self.pipes)} raised:\n{value}")
        return value

    def kill(self, grace: float = 0) -> None:
        """SIGKILL to every rank that does not end by itself within `grace` seconds."""
        for process in self.processes:
            process.join(grace) if grace else None
            if process.is_alive():
                process.kill()
        for process in self.processes:
            process.join()

    def signal(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid or 0, number)


def _rank(sender: Connection, environment: dict[str, str], target: Callable[..., Any], args: tuple) -> None:
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    try:
        result = (False, target(*args))
    except BaseException:
        result = (True, traceback.format_exc())
    sender.send(result)
    sender.close()
    from zeropipe.trainer.distributed import shut_down

    if not result[0]:  # after a failure the others may never come to say good-bye
        shut_down()
    os._exit(0)
