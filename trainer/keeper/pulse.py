"""The pulse of a rank: which phase it is in, at which step, and since when, where its keeper can read it at any time.

A record in memory that both share: the rank writes it in about two microseconds, and its keeper reads it even while
the rank is stopped or waits in C++.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

SET_UP, STEP, EVALUATION, SAVING = PHASES = ("set-up", "step", "evaluation", "save")
# phase, step, monotonic time of entering the phase and of the last beat, the longest time in each phase
_RECORD = struct.Struct(f"<qqdd{len(PHASES)}d")
_FADING = 0.95  # of the longest step with every step, so that the first ones, which compile, are forgotten
KEPT_FILES = "ZEROPIPE_KEPT"  # process id and the files that it shares with its keeper: pulse, words


@dataclass(frozen=True)
class Beat:
    """One reading of a pulse."""

    phase: str
    step: int
    quiet: float  # seconds since the last beat
    longest: tuple[float, ...]  # seconds spent in one go in each of PHASES; 0 where none has ended yet


class Pulse:
    """Of this rank. Nobody reads it where the rank has no keeper."""

    def __init__(self, file: int | None) -> None:
        """`file`: as `shared_memory` makes it."""
        self._memory = mmap.mmap(-1 if file is None else file, _RECORD.size)
        self._phase, self._step, self._since, _, *self._longest = _RECORD.unpack_from(self._memory)

    @classmethod
    def of_this_rank(cls) -> Pulse:
        files = kept_files()
        return cls(files[0] if files else None)

    def step(self, step: int) -> None:
        """A step begins, counted from 0."""
        self._go_on(STEP, step, learn=True)

    @contextlib.contextmanager
    def during(self, phase: str, learn: bool = True) -> Iterator[None]:
        """The rank is in this phase meanwhile; whatever may take much longer than a step is put into one.

        Args:
            learn: whether a later one that takes much longer is taken for a hang.
        """
        before = PHASES[self._phase]
        self._go_on(phase, self._step, learn=False)
        yield
        self._go_on(before, self._step, learn)

    def learn(self, phase: str, seconds: float) -> None:
        """How long a phase can take, where that is not seen by when it begins and ends."""
        self._longest[PHASES.index(phase)] = max(seconds, self._longest[PHASES.index(phase)])

    def _go_on(self, phase: str, step: int, learn: bool) -> None:
        now, before = time.monotonic(), self._phase
        if learn:
            fading = _FADING if PHASES[before] == STEP else 1.0
            self._longest[before] = max(now - self._since, fading * self._longest[before])
        self._phase, self._step, self._since = PHASES.index(phase), step, now
        self._write(now)

    def beat(self) -> None:
        """The rank is getting on with its phase: to be called in phases that may be long, after each part."""
        self._write(time.monotonic())

    def _write(self, now: float) -> None:
        _RECORD.pack_into(self._memory, 0, self._phase, self._step, self._since, now, *self._longest)


def shared_memory() -> int:
    """A file in memory for a pulse that has not begun; its descriptor is inherited by forks."""
    file = os.memfd_create("zeropipe-pulse")
    now = time.monotonic()
    os.write(file, _RECORD.pack(0, 0, now, now, *[0.0] * len(PHASES)))
    return file


def read_pulse(file: int) -> Beat:
    phase, step, _, beaten, *longest = _RECORD.unpack(os.pread(file, _RECORD.size, 0))
    return Beat(PHASES[phase], step, time.monotonic() - beaten, tuple(longest))


def kept_files() -> list[int] | None:
    """Descriptors of the files that this process shares with its keeper; None if it has none (as what it starts)."""
    owner, *files = os.environ.get(KEPT_FILES, "0").split(":")
    return [int(file) for file in files] if int(owner) == os.getpid() else None
