"""How far long work is: on a terminal a bar with its rate and the time left, elsewhere nothing. No thread draws it, so
that no process which is forked meanwhile inherits one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from ..sizes import format_bytes

Told = Callable[[float, float], None]  # how much has been done, of how much
_APART = 0.1  # seconds between two drawings


def untold(done: float, total: float) -> None:
    """Where nobody looks."""


class Bar:
    """A bar on stderr, or on `stream`, if that is a terminal; it is gone when it is left. Called as `Told`, in bytes
    unless a `unit` is named.
    """

    def __init__(self, what: str, unit: str = "", stream: TextIO | None = None) -> None:
        self._what, self._unit, self._stream = what, unit, stream or sys.stderr
        self._drawn = self._begun = time.monotonic()
        self._first: float | None = None  # what was done before: it sets no pace
        self._shown: Any = None

    def __enter__(self) -> Bar:
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.fields[said]}"),
                TimeRemainingColumn(),
            )
            console = Console(file=self._stream)
            self._shown = Progress(*columns, console=console, auto_refresh=False, transient=True)
            self._shown.start()
            self._task = self._shown.add_task(self._what, total=None, said="")
        return self

    def __exit__(self, *error: object) -> None:
        if self._shown is not None:
            self._shown.stop()

    def __call__(self, done: float, total: float, said: str = "") -> None:
        """`said`: in place of the rate."""
        if self._shown is None:
            return
        now = time.monotonic()
        self._first = done if self._first is None else self._first
        self._shown.update(self._task, completed=done, total=total)
        if now - self._drawn >= _APART or done >= total:
            self._drawn = now
            rate = (done - self._first) / max(now - self._begun, 1e-9)
            how = f"{rate:,.0f} {self._unit}/s" if self._unit else f"{format_bytes(int(rate))}/s"
            self._shown.update(self._task, said=said or how)
            self._shown.refresh()

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._shown is None:
            print(text, file=self._stream, flush=True)
        else:
            self._shown.console.print(text, markup=False, highlight=False, soft_wrap=True)
