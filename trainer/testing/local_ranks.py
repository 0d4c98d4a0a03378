"""Ranks of this machine in processes of their own, each made afresh: for checks that try many layouts, and for tests.

On CPUs they are forked from a server that has imported torch and DeepSpeed already, so that a rank costs 0.1 s and not
five. Where there is an accelerator they are spawned: DeepSpeed asks for it when it is imported, and a process forked
after that cannot use CUDA.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from ..ranks.ports import free_port

# imported once by the server that ranks are forked from
PRELOADED = ("zeropipe.trainer.testing.preload",)


class RankFailed(Exception):
    """A rank raised, died or hung; the message tells which and why."""


def on_local_ranks(world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 600) -> list[Any]:
    """Calls `function(*arguments)` on `world` ranks; returns what each returned, in rank order.

    Args:
        function: of a module, so that it can be pickled; it joins the process group itself.

    Raises:
        RankFailed: the first rank that failed, or those that were not done after `timeout` seconds.
    """
    group = RankGroup(world, function, *arguments)
    try:
        return group.results(timeout)
    finally:
        group.kill(grace=5)


class RankGroup:
    """Ranks under way, for callers that interfere with them."""

    def __init__(self, world: int, function: Callable[..., Any], *arguments: Any) -> None:
        context: Any = multiprocessing.get_context("spawn" if _has_accelerator() else "forkserver")
        if not _has_accelerator():
            context.set_forkserver_preload(list(PRELOADED))
        self._pipes: list[Connection] = []
        self._processes = []
        port = free_port()
        for rank in range(world):
            receiver, sender = context.Pipe(duplex=False)
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_PORT": port}
            environment = {"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in place.items()}}
            process = context.Process(target=_rank, args=(sender, environment, function, arguments), daemon=True)
            process.start()
            sender.close()
            self._pipes.append(receiver)
            self._processes.append(process)

    def results(self, timeout: float) -> list[Any]:
        """What each rank returned, in rank order.

        Raises:
            RankFailed: the first rank that failed, or those that did not finish within `timeout` seconds.
        """
        deadline, found = time.monotonic() + timeout, {}
        while len(found) < len(self._pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in found}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                ranks = sorted(waiting.values())
                raise RankFailed(f"ranks {ranks} of {len(self._pipes)} did not finish within {timeout:.0f} s")
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                found[rank] = self._receive(rank)
        return [found[rank] for rank in range(len(self._pipes))]

    def _receive(self, rank: int) -> Any:
        try:
            failed, value = self._pipes[rank].recv()
        except EOFError:
            raise RankFailed(f"rank {rank} of {len(self._pipes)} died without a word") from None
        if failed:
            raise RankFailed(f"rank {rank} of {len(self._pipes)} raised:\n{value}")
        return value

    def kill(self, grace: float = 0) -> None:
        """SIGKILL to every rank that does not end by itself within `grace` seconds."""
        for process in self._processes:
            process.join(grace)
            if process.is_alive():
                process.kill()
                process.join()


def _has_accelerator() -> bool:
    """Whether DeepSpeed would look for something else than CPUs. This process may ask: its children are not forked."""
    import torch

    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.accelerator.is_available()


def _rank(sender: Connection, environment: dict[str, str], function: Callable[..., Any], arguments: tuple) -> None:
    os.environ.update(environment)
    import torch

    from ..ranks.ranks import shut_down

    share = max(1, len(os.sched_getaffinity(0)) // int(environment["WORLD_SIZE"]))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", share)))
    try:
        result = False, function(*arguments)
    except BaseException:
        result = True, traceback.format_exc()
    sender.send(result)
    sender.close()
    if not result[0]:  # after a failure the others may never come to say good-bye
        shut_down()
    os._exit(0)
