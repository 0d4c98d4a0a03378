"""The processes of one launch on this host, found by a mark in their environment; run on other hosts through ssh.

`python -m zeropipe.launcher.processes MARK KILL` kills them all, `… MARK SIGTERM` signals the ranks; prints how many.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time

import psutil

MARK = "ZEROPIPE_LAUNCH"  # in the environment of everything that a launch starts; the value is the launch's own folder


def find_processes(mark: str, ranks_only: bool = False) -> list[psutil.Process]:
    """Processes of the launch `mark` that still run; `ranks_only` leaves out the launchers and what ranks started."""
    found = {}
    for process in psutil.process_iter():
        try:
            environ = process.environ()
            if environ.get(MARK) != mark or (ranks_only and "LOCAL_RANK" not in environ):
                continue
            if process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = (process, process.ppid())
        except (psutil.Error, OSError):  # it has ended, or belongs to someone else
            continue
    return [process for process, parent in found.values() if not (ranks_only and parent in found)]


def send(mark: str, number: int, ranks_only: bool = False) -> list[int]:
    """Signals the processes of a launch; returns the ids of those that got it."""
    reached = []
    for process in find_processes(mark, ranks_only):
        try:
            process.send_signal(number)
            reached.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return reached


def kill(mark: str, seconds: float = 5) -> int:
    """Kills every process of a launch, and those that they start meanwhile, and sees them gone; returns how many."""
    killed = 0
    deadline = time.monotonic() + seconds
    while (found := find_processes(mark)) and time.monotonic() < deadline:
        for process in found:
            with contextlib.suppress(psutil.Error, OSError):
                process.kill()
        killed += len(psutil.wait_procs(found, max(0.1, deadline - time.monotonic()))[0])
    return killed


if __name__ == "__main__":
    if sys.argv[2] == "KILL":
        print(kill(sys.argv[1]))
    else:
        print(len(send(sys.argv[1], signal.Signals[sys.argv[2]], ranks_only=True)))
