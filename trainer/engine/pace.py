"""How the ranks of a step fared, by rank: seconds in the forward pass, seconds without data, memory.

On the steps that people are shown, each rank puts its own numbers in its own place of the row that is summed at the end
of every step anyway, so that no collective is added.
"""

from __future__ import annotations

import time
from typing import Any

import psutil
from torch import nn

from ..plan.plan import Plan
from ..ranks.ranks import Ranks, accelerator
from ..run.state import Fared
from ..sinks.console import peak_memory


class Pace:
    """Times the forward pass of this rank's module, which waits for no other rank unless the layout makes it."""

    def __init__(self, plan: Plan, ranks: Ranks) -> None:
        self._every, self._ranks = plan.recipe.log.every, ranks
        layout = plan.layout
        self._alone = layout.zero_stage < 3 and layout.tensor == layout.sequence == 1
        self._seconds, self._open, self._spans = 0.0, 0.0, list[tuple[Any, Any]]()

    def watch(self, module: nn.Module) -> None:
        """Times every call of `module` from now on, where that says something about this rank."""
        if self._alone:
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave)

    def begin(self) -> None:
        self._seconds = 0.0
        self._spans.clear()

    def row(self, step: int, data_seconds: float) -> list[float]:
        """What this rank adds to the step's sums; empty on steps that nobody is shown."""
        if (step + 1) % self._every:
            return []
        row = [0.0] * (self._ranks.world * len(Fared._fields))
        forward = self._seconds + sum(start.elapsed_time(end) for start, end in self._spans) / 1e3
        mine = Fared(forward if self._alone else 0.0, data_seconds, peak_memory(), psutil.virtual_memory().used)
        first = self._ranks.rank * len(mine)
        row[first : first + len(mine)] = map(float, mine)
        return row

    @staticmethod
    def read(row: list[float]) -> tuple[Fared, ...]:
        """By rank, from the sum of all ranks' rows."""
        size = len(Fared._fields)
        return tuple(Fared(*row[i : i + size]) for i in range(0, len(row), size))

    def _enter(self, *_: object) -> None:
        if self._ranks.device.type == "cpu":
            self._open = time.perf_counter()
            return
        event = accelerator().Event(enable_timing=True)  # read when the device has passed it: nobody waits for it
        event.record()
        self._open = event

    def _leave(self, *_: object) -> None:
        if self._ranks.device.type == "cpu":
            self._seconds += time.perf_counter() - self._open
            return
        event = accelerator().Event(enable_timing=True)
        event.record()
        self._spans.append((self._open, event))
