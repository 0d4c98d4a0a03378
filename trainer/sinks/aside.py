"""A sink in a thread of its own: one that raises, is slow or never comes back costs no step anything.

Between the run and the thread is a queue of bounded length. What does not fit is dropped, counted, and told once;
metrics.jsonl has it all.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Collection, Mapping
from queue import SimpleQueue
from threading import Thread
from typing import Any

from .base import Sink, SinkSettings
from .registry import SINKS

MOST_WAITING = 10_000  # records
PATIENCE = 30.0  # seconds, at the end of a run, for all together


class Aside:
    """The sink of that name. Calls return at once, but for `wait`, and raise nothing."""

    def __init__(self, name: str, settings: SinkSettings) -> None:
        self._name = name
        self._queue: SimpleQueue[SinkSettings | tuple[Mapping[str, Any], str | None] | None] = SimpleQueue()
        self._dropped, self._failed = 0, False
        self.reopen(settings)
        # a daemon: Python does not wait for it when the process ends
        self._thread = Thread(target=self._serve, name=f"sink {name}", daemon=True)
        self._thread.start()

    def reopen(self, settings: SinkSettings) -> None:
        """The records from here on are those of a run that went back."""
        self._queue.put(settings)

    def write(self, record: Mapping[str, Any], message: str | None) -> None:
        """`record` is not to change any more."""
        if self._failed:
            return
        if self._queue.qsize() < MOST_WAITING:
            self._queue.put((record, message))
            return
        if not self._dropped:
            self._warn(f"is {MOST_WAITING:,} records behind; it gets none until it has caught up")
        self._dropped += 1

    def end(self) -> None:
        """Nothing more will be written."""
        self._queue.put(None)

    def wait(self, deadline: float) -> None:
        """Until all has been written, or, by time.monotonic, the deadline; tells what did not arrive."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._failed:
            return
        missing = self._dropped + max(0, self._queue.qsize() - 1)
        if self._thread.is_alive():
            self._warn(f"is not done and is left; {missing:,} records or more did not reach it")
        elif missing:
            self._warn(f"did not get {missing:,} records; metrics.jsonl has them all")

    def _serve(self) -> None:
        sink: Sink | None = None
        try:
            while (item := self._queue.get()) is not None:
                if isinstance(item, tuple):
                    assert sink is not None
                    sink.write(*item)
                    continue
                if sink is not None:
                    sink.close()
                sink = SINKS[self._name](item)
            if sink is not None:
                sink.close()
        except BaseException as error:  # of a library that may even call sys.exit: a curve is not worth a run
            self._failed = True
            why = isinstance(error, OSError) and error.strerror
            self._warn(f"fails and is left out from here on: {why or f'{type(error).__name__}: {error}'}")
            if sink is not None:
                with contextlib.suppress(BaseException):
                    sink.close()

    def _warn(self, what: str) -> None:
        print(f"warning: log.sinks: {self._name} {what}", file=sys.stderr, flush=True)


def close_all(asides: Collection[Aside]) -> None:
    """Waits for all of them, but not for ever."""
    for aside in asides:
        aside.end()
    deadline = time.monotonic() + PATIENCE
    for aside in asides:
        aside.wait(deadline)
