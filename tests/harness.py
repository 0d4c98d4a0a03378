"""Runs a function on real gloo ranks, each a fresh process forked from a server that has already imported torch."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(world: int, target: Callable[..., Any], *args: Any, timeout: float = 180) -> list[Any]:
    """Calls `target(*args)` on `world` ranks and returns what each returned (picklable), in rank order.

    `target` is a module-level function; it joins the group itself (`init_distributed`). The first rank that raises
    fails the test with its traceback; a hang is killed after `timeout` seconds and fails with the ranks that hung.
    """
    port = free_port()
    pipes, processes = [], []
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
        pipes.append(receiver)
        processes.append(process)
    try:
        return _collect(pipes, time.monotonic() + timeout, timeout)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(pipes: list[Connection], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            hung = [rank for rank in range(len(pipes)) if rank not in results]
            raise AssertionError(f"ranks {hung} of {len(pipes)} did not finish within {timeout:.0f} s")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                failed, value = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                raise AssertionError(f"rank {rank} of {len(pipes)} died without a word") from None
            if failed:
                raise AssertionError(f"rank {rank} of {len(pipes)} raised:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


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
