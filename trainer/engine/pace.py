"""How the ranks of a step fared, by rank: seconds in the forward pass, seconds without data, memory.

On the steps that people are shown, each rank tells rank 0 its own few numbers, which no other rank needs.

Where the forward pass waits for other ranks (ZeRO-3, tensor and sequence parallel), all ranks take as long as the
slowest one. There the modules that wait for nobody are timed one by one: DeepSpeed gathers parameters, and a split
layer meets the others, before and after them, or in modules that are left out.
"""

from __future__ import annotations

import time
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import nn

from ..plan.plan import Plan
from ..ranks.ranks import Ranks, accelerator
from ..run.state import Fared
from ..sinks.console import peak_memory


class Pace:
    """Times the forward pass of this rank's module, or the parts of it that wait for no other rank."""

    def __init__(self, plan: Plan, ranks: Ranks) -> None:
        self._every, self._ranks = plan.recipe.log.every, ranks
        layout = plan.layout
        self._alone = layout.zero_stage < 3 and layout.tensor == layout.sequence == layout.expert == 1
        # what is compiled would be compiled anew with every change of its modules' hooks
        self._timed = self._alone or plan.recipe.compile == "none"
        self._parts, self._hooks = list[nn.Module](), list[Any]()
        self._seconds, self._open, self._spans = 0.0, 0.0, list[tuple[Any, Any]]()

    def watch(self, module: nn.Module) -> None:
        """Times every call of `module`, or of its parts, from now on."""
        if self._timed:
            self._parts = [module] if self._alone else [part for part in module.modules() if _waits_for_nobody(part)]

    def begin(self, step: int) -> None:
        self._seconds = 0.0
        self._spans.clear()
        if self._shown(step):
            for part in self._parts:  # inside of what others have hooked in, which may wait
                self._hooks.append(part.register_forward_pre_hook(self._enter))
                self._hooks.append(part.register_forward_hook(self._leave, prepend=not self._alone))

    def told(self, step: int, data_seconds: float) -> tuple[Fared, ...]:
        """How all ranks fared, on rank 0; nothing on the others, and on steps that nobody is shown. Collective."""
        if not self._shown(step):
            return ()
        while self._hooks:
            self._hooks.pop().remove()
        forward = self._seconds + sum(start.elapsed_time(end) for start, end in self._spans) / 1e3
        mine = Fared(forward, data_seconds, peak_memory(), psutil.virtual_memory().used)
        own = torch.tensor(mine, dtype=torch.float64, device=self._ranks.device)
        if self._ranks.world == 1:
            return (Fared(*own.tolist()),)
        received = [torch.empty_like(own) for _ in range(self._ranks.world)] if self._ranks.is_main else None
        dist.gather(own, received)
        return tuple(Fared(*of_rank.tolist()) for of_rank in received or ())

    def _shown(self, step: int) -> bool:
        return (step + 1) % self._every == 0

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


def _waits_for_nobody(module: nn.Module) -> bool:
    """Whether it is one of the smallest modules, with its own class's forward, and knows no other rank."""
    if any(module.children()) or "forward" in vars(module):
        return False
    return not any(isinstance(value, (dist.ProcessGroup, Ranks)) for value in vars(module).values())
