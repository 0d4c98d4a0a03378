"""How far a preparation is: documents/s, MB/s, tokens/s and the time left, as a bar on a terminal, else as lines."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from .bars import Bar

_APART = 10  # seconds between two lines


class ProgressLine:
    """Counts and prints: on a terminal a bar, elsewhere a line now and then."""

    def __init__(self, total_bytes: int, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.total_bytes = total_bytes
        self.quiet = quiet
        self.stream = stream or sys.stderr
        self.documents = self.tokens = self.text_bytes = self.source_bytes = 0
        self._bar = Bar("prepare", stream=self.stream) if self.stream.isatty() and not quiet else None
        self.started = self._printed = time.monotonic()
        self._skipped = 0

    def __enter__(self) -> ProgressLine:
        if self._bar is not None:
            self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(*error)

    def resume(self, cost: int) -> None:
        """Notes source bytes that were done before this run: they count for the share, not for the speed."""
        self._skipped += cost

    def batch(self, documents: int, tokens: int, text_bytes: int) -> None:
        """Counts what was encoded, and prints now and then."""
        self.documents += documents
        self.tokens += tokens
        self.text_bytes += text_bytes
        self._print()

    def task(self, cost: int) -> None:
        """Counts the source bytes of a finished task."""
        self.source_bytes += cost
        self._print()

    def _print(self) -> None:
        now = time.monotonic()
        if self._bar is not None:
            self._bar(self._skipped + self.source_bytes, self.total_bytes, self._rates())
        elif not self.quiet and now - self._printed >= _APART:
            self._printed = now
            self.stream.write(f"{self.line()}\n")
            self.stream.flush()

    def line(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        done, left = self._skipped + self.source_bytes, self.total_bytes - self._skipped - self.source_bytes
        eta = f"{left / (self.source_bytes / seconds):,.0f} s left" if self.source_bytes else "time left unknown"
        return f"{100 * done / max(1, self.total_bytes):3.0f} %  {self._rates()}  {eta}"

    def _rates(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        return (
            f"{self.documents / seconds:,.0f} documents/s  {self.text_bytes / seconds / 1e6:,.1f} MB/s  "
            f"{self.tokens / seconds:,.0f} tokens/s"
        )

    def inform(self, text: str) -> None:
        """As `say`, unless quiet."""
        if not self.quiet:
            self.say(text)

    def say(self, text: str) -> None:
        """A line of its own, above the progress."""
        if self._bar is not None:
            self._bar.say(text)
            return
        self.stream.write(text + "\n")
        self.stream.flush()

    def finish(self) -> None:
        if not self.quiet:
            self.say(self.line())
