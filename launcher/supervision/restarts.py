"""What a launch needs to go on after a rank or a host has failed: hosts that answer, a checkpoint to resume from."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ...data_prep.errors import UserError
from ..hosts.hostfile import Host
from ..hosts.ssh import ssh_command

ANSWER_SECONDS = 8.0
_P = TypeVar("_P")


def hosts_that_answer(hosts: Sequence[Host], port: int | None) -> tuple[Host, ...]:
    """Those that can be reached by ssh right now, in their order."""
    with ThreadPoolExecutor(64) as pool:
        answers = pool.map(lambda host: _answers(ssh_command(host.name, port, "true")), hosts)
        return tuple(host for host, answer in zip(hosts, answers, strict=True) if answer)


def _answers(command: Sequence[str]) -> bool:
    try:
        done = subprocess.run(
            list(command), stdin=subprocess.DEVNULL, capture_output=True, timeout=ANSWER_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def most_hosts(hosts: Sequence[Host], least: int, plan: Callable[[int], _P]) -> tuple[tuple[Host, ...], _P]:
    """As many of the hosts, from the first on, as make a legal plan, and that plan.

    Args:
        least: so many at least.
        plan: makes a plan for a number of ranks, or raises UserError.

    Raises:
        UserError: why none of these numbers is legal; of the largest one.
    """
    first: UserError | None = None
    for count in range(len(hosts), least - 1, -1):
        taken = tuple(hosts[:count])
        try:
            return taken, plan(sum(host.slots for host in taken))
        except UserError as error:
            first = first or error
    raise first or UserError(f"{len(hosts)} hosts answer, and --min-hosts {least} are needed")


def resume_word(output: Path, resume: str, since: float) -> str | None:
    """An override by which a restart goes on from the newest checkpoint that this launch has made.

    None where the recipe's own `resume` does so, or there is none yet.

    Args:
        since: when the launch began, by time.time.
    """
    if resume == "auto":
        return None
    made = [path for path in (output / "checkpoints").glob("step-*") if path.stat().st_mtime >= since]
    return f"resume={max(made)}" if made else None
