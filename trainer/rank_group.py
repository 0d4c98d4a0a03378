"""Ranks of this machine in processes of their own, each made afresh: for checks that try many layouts."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from .ports import free_port

# imported once by the server that ranks are forked from; none of it touches a device
PRELOADED = ("zeropipe.trainer.preload",)


class RankFailed(Exception):
    """A rank raised, died or hung; the message tells which and why."""


def on_local_ranks(world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 600) -> list[Any]:
    """Calls `function(*arguments)` on `world` ranks; returns what each returned, in rank order.

    Args:
        function: of a module, so that it can be pickled; it joins the process group itself.

    Raises:
        RankFailed: the first rank that failed, or those that were not done after `timeout` seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    port, pipes, processes = free_port(), [], []
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_PORT": port}
        environment = {"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in place.items()}}
        process = context.Process(target=_rank, args=(sender, environment, function, arguments), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        return _results(pipes, timeout)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _results(pipes: list[Connection], timeout: float) -> list[Any]:
    deadline, results = time.monotonic() + timeout, {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailed(f"ranks {sorted(waiting.values())} of {len(pipes)} were not done after {timeout:.0f} s")
        for pipe in ready:
            rank = waiting[pipe]  # type: ignore[index]
            try:
                failed, value = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                raise RankFailed(f"rank {rank} of {len(pipes)} died without a word") from None
            if failed:
                raise RankFailed(f"rank {rank} of {len(pipes)} raised:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(sender: Connection, environment: dict[str, str], function: Callable[..., Any], arguments: tuple) -> None:
    os.environ.update(environment)
    import torch

    from .distributed import shut_down

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
