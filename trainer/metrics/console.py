"""The progress line of a run: one tidy line, rewritten in place on a terminal."""

from __future__ import annotations

import math
import shutil
import sys
import time
from dataclasses import dataclass, field
from typing import TextIO

from ...data_prep.sizes import format_bytes


def duration(seconds: float) -> str:
    """12s, 3m05s, 2h07m, 3d04h: two units are enough to decide whether to wait."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


@dataclass
class Progress:
    """Prints what happens; measures tokens per second between two lines, and the time left from this process's pace."""

    total_steps: int
    stream: TextIO = field(default_factory=lambda: sys.stdout)
    clock: float = field(default_factory=time.monotonic)
    first: tuple[int, float] | None = None  # step and time of the first step seen: later ones set the pace
    since: tuple[int, float] = (0, 0.0)  # tokens and seconds since the last line
    steps: int = 0  # taken by this process
    open_line: bool = False

    def step(self, step: int, tokens: int, seconds: float) -> None:
        """Counts a step, printed or not."""
        self.steps += 1
        if self.first is None:
            self.first = (step, time.monotonic())  # the first step compiles and warms up: it sets no pace
        self.since = (self.since[0] + tokens, self.since[1] + seconds)

    def seconds_left(self, step: int) -> float:
        if self.first is None or step == self.first[0]:
            return math.nan
        return (self.total_steps - step) * (time.monotonic() - self.first[1]) / (step - self.first[0])

    def line(self, step: int, loss: float, lr: float, grad_norm: float | None, memory: int) -> None:
        tokens, seconds = self.since
        self.since = (0, 0.0)
        norm = "-" if grad_norm is None else f"{grad_norm:.3f}"
        text = (
            f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}  loss {loss:.4f}  lr {lr:.2e}  grad {norm}  "
            f"{tokens / seconds if seconds else 0:,.0f} tokens/s  ETA {duration(self.seconds_left(step))}  "
            f"mem {format_bytes(memory)}"
        )
        if not self.stream.isatty():
            print(text, file=self.stream, flush=True)
            return
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[K{text[:width]}", end="", file=self.stream, flush=True)
        self.open_line = True

    def say(self, text: str) -> None:
        """A line of its own, below the progress line."""
        if self.open_line:
            print(file=self.stream)
            self.open_line = False
        print(text, file=self.stream, flush=True)
