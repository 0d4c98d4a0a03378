"""The processes of one launch on this host, found by a mark in their environment; run on other hosts through ssh.

`python -m zeropipe.launcher.supervision.processes FOLDER` kills them all. Ranks end by themselves when the launcher is
gone; this is for what they, and DeepSpeed's launchers, leave.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time

import psutil

from ...trainer.keeper.wire import LAUNCH_FOLDER


def find_processes(mark: str) -> list[psutil.Process]:
    """Processes of the launch with this folder that still run, but for this one.

    Where hosts are network namespaces of one machine, each has only its own.
    """
    found, here = [], os.readlink("/proc/self/ns/net")
    for process in psutil.process_iter():
        try:
            if process.environ().get(LAUNCH_FOLDER) != mark or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.pid != os.getpid() and os.readlink(f"/proc/{process.pid}/ns/net") == here:
                found.append(process)
        except (psutil.Error, OSError):  # it has ended, or belongs to someone else
            continue
    return found


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
    kill(sys.argv[1])
