"""What surrounds a run: its directory, which one run at a time may use, and the signals that ask it to stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from ...data_prep.durable import write_durably
from ...data_prep.errors import UserError
from ...data_prep.lock import LockedError, lock_file
from ..plan.plan import Plan
from ..ranks.ranks import Ranks
from ..recipe.recipe import dump_recipe
from .requests import SAVE, STOP, take_request

_OWNER = ".owner"
_LOOK = 1.0  # seconds between two looks for a request: a shared file system is not asked in every step
_CANNOT_WRITE = "the run's output cannot be written"


@contextmanager
def exclusive(output: Path, ranks: Ranks) -> Iterator[None]:
    """Makes the run directory and keeps other runs out of it. Collective.

    Raises:
        UserError: on every rank, if it cannot be written or another run is using it.
    """
    lock = ranks.together(lambda: _lock(output) if ranks.is_main else None, _CANNOT_WRITE, output)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def claim(output: Path, run: str) -> None:
    """Notes which run owns the directory. For one rank.

    Where a file system keeps locks to one host, or has none, a run on another host is not held back: the one that came
    last owns the directory, and the one before finds that out when it is about to save.

    Raises:
        OSError: it cannot be written.
    """
    write_durably(output / _OWNER, f"{run} process {os.getpid()} on {socket.gethostname()}\n")


def check_claim(output: Path, run: str) -> None:
    """Looks whether the directory is still this run's, before something is saved there. For one rank.

    Raises:
        UserError: another run has begun there.
    """
    try:
        owner, _, where = (output / _OWNER).read_text(encoding="utf-8").strip().partition(" ")
    except FileNotFoundError:  # nobody's
        return
    if owner != run:
        raise UserError(
            f"output: another run ({where}) has begun in {output} and owns it now; this one saves nothing more there. "
            "Its file system does not hold runs of two hosts apart: give each an output of its own"
        )


def record_configuration(plan: Plan) -> None:
    """Writes recipe.yaml and deepspeed.json as resolved, so that the pair can be run again as it is. For one rank.

    Raises:
        OSError: they cannot be written.
    """
    write_durably(plan.recipe.output / "recipe.yaml", dump_recipe(plan.recipe))
    write_durably(plan.recipe.output / "deepspeed.json", json.dumps(plan.deepspeed, indent=2) + "\n")


def _lock(output: Path) -> IO[str]:
    output.mkdir(parents=True, exist_ok=True)
    try:
        return lock_file(output / ".lock")
    except LockedError as error:
        raise UserError(
            f"output: {output} is in use by {error.holder}; wait for it, stop it, or choose another output"
        ) from None


class StopRequest:
    """What this process was asked: to save and stop, by SIGTERM, SIGUSR1, a file, or because it cannot go on alone; or
    just to save, by a file (`requests.py`), which the main rank looks for.

    As a context it listens to the signals, and the loop sees the request at the end of a step; at the end, what kept
    any rank from going on is raised on all of them.
    """

    def __init__(self, ranks: Ranks, output: Path | None = None) -> None:
        """`output`: the run directory; None where nobody asks by files."""
        self.asked = False
        self.problem: str | None = None
        self._ranks, self._before, self._looked = ranks, {}, 0.0
        self._output = output if ranks.is_main else None

    def look(self) -> tuple[bool, bool]:
        """Whether this rank is asked to stop, and whether to save: to be said in the next step."""
        save, now = False, time.monotonic()
        if self._output is not None and now - self._looked > _LOOK:
            self._looked, asked = now, take_request(self._output)
            self.asked |= asked == STOP
            save = asked == SAVE
        return self.asked, save

    def because(self, problem: str) -> None:
        """Asks all ranks to save and stop at the end of the step; the first problem is the one to tell."""
        self.problem, self.asked = self.problem or problem, True

    def __enter__(self) -> StopRequest:
        if self._output is not None:
            take_request(self._output)  # of a run that ended before it saw it
        if threading.current_thread() is threading.main_thread():  # no other may listen: Ray trains in one of its own
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None:
            self._ranks.raise_together(self.problem)
