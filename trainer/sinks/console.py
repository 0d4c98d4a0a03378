"""What a run prints: one tidy line of progress, rewritten in place on a terminal, and messages below it."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from ...data_prep.sizes import format_bytes
from .base import SinkSettings


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


class Console:
    """The sink: a line for every step that is shown, and each record's message."""

    def __init__(self, settings: SinkSettings) -> None:
        self._settings, self.progress = settings, StepLine(settings.total_steps)

    def write(self, record: Mapping[str, Any], message: str | None) -> None:
        if record["kind"] == "train":
            self.progress.step(record["step"], record["tokens_per_second"] or 0.0, record["step_seconds"])
            if self._settings.shown(record["step"]):
                self.progress.line(record["step"], record["loss"], record["lr"], record["grad_norm"], peak_memory())
        if message is not None:
            self.progress.say(message)

    def close(self) -> None:
        self.progress.end_line()


def peak_memory() -> int:
    """Bytes: the accelerator's peak on this rank; on a CPU the peak of the resident set that DeepSpeed has seen."""
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    return accelerator.max_memory_allocated()


@dataclass
class StepLine:
    """Prints what happens; measures tokens per second between two lines, and the time left from this process's pace."""

    total_steps: int
    stream: TextIO = field(default_factory=lambda: sys.stdout)
    first: tuple[int, float] | None = None  # step and time of the first step seen: later ones set the pace
    since: tuple[float, float] = (0.0, 0.0)  # tokens and seconds since the last line
    open_line: bool = False

    def step(self, step: int, rate: float, seconds: float) -> None:
        """Counts a step, printed or not; `rate` in tokens per second."""
        if self.first is None:
            self.first = (step, time.monotonic())  # the first step compiles and warms up: it sets no pace
        self.since = (self.since[0] + rate * seconds, self.since[1] + seconds)

    def seconds_left(self, step: int) -> float:
        """NaN before there is a pace."""
        if self.first is None or step == self.first[0]:
            return math.nan
        return (self.total_steps - step) * (time.monotonic() - self.first[1]) / (step - self.first[0])

    def line(self, step: int, loss: float, lr: float, grad_norm: float | None, memory: int) -> None:
        """Prints a step, on a terminal over the last one; `memory` in bytes."""
        tokens, seconds = self.since
        self.since = (0.0, 0.0)
        norm = "-" if grad_norm is None else f"{grad_norm:.3f}"
        text = (
            f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}  loss {loss:.4f}  lr {lr:.2e}  grad {norm}  "
            f"{tokens / seconds if seconds else 0:,.0f} tokens/s  ETA {duration(self.seconds_left(step))}  "
            f"mem {format_bytes(memory)}"
        )
        if not self.stream.isatty():
            self._print(text)
            return
        width = shutil.get_terminal_size().columns - 1
        self._print(f"\r\x1b[K{text[:width]}", end="")
        self.open_line = True

    def say(self, text: str) -> None:
        """A line of its own, below the progress line."""
        self.end_line()
        self._print(text)

    def end_line(self) -> None:
        """Leaves the progress line as it stands."""
        if self.open_line:
            self._print("")
            self.open_line = False

    def _print(self, text: str, end: str = "\n") -> None:
        """On whatever reads it; a run does not end for want of a reader, such as an ssh that was told to stop first."""
        try:
            print(text, end=end, file=self.stream, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
