"""What surrounds a run: its directory, which one run at a time may use, and the signals that ask it to stop."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any

from ...data_prep.durable import write_durably
from ...data_prep.errors import UserError
from ...data_prep.lock import LockedError, lock_file
from ..plan.plan import Plan
from ..ranks.ranks import Ranks
from ..recipe.recipe import Recipe, dump_recipe

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


def record_configuration(recipe: Recipe, plan: Plan, ranks: Ranks) -> None:
    """Writes recipe.yaml and deepspeed.json as resolved, so that the pair can be run again as it is. Collective.

    Raises:
        UserError: on every rank, if they cannot be written.
    """

    def write() -> None:
        write_durably(recipe.output / "recipe.yaml", dump_recipe(recipe))
        write_durably(recipe.output / "deepspeed.json", json.dumps(plan.deepspeed, indent=2) + "\n")

    ranks.together(lambda: write() if ranks.is_main else None, _CANNOT_WRITE, recipe.output)


def _lock(output: Path) -> IO[str]:
    output.mkdir(parents=True, exist_ok=True)
    try:
        return lock_file(output / ".lock")
    except LockedError as error:
        raise UserError(
            f"output: {output} is in use by {error.holder}; wait for it, stop it, or choose another output"
        ) from None


class Signals:
    """Whether this process was asked to save and stop: by SIGTERM, SIGUSR1, or because it cannot go on alone."""

    def __init__(self) -> None:
        self.asked = False
        self.problem: str | None = None

    def ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True

    def attempt(self, action: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """Does what this rank alone does (the record, on rank 0). If it cannot, all ranks save and stop first."""
        try:
            action(*arguments, **options)
        except UserError as error:
            self.problem, self.asked = self.problem or str(error), True


@contextmanager
def stop_signals() -> Iterator[Signals]:
    """Turns SIGTERM and SIGUSR1 into a request that the loop sees at the end of a step."""
    signals = Signals()
    before = {number: signal.signal(number, signals.ask) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
