"""The rank that a keeper looks after: a forked process, the files it shares with its keeper, how it is and ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from typing import Any

from .kept import ASK_FOR_STACKS, begin_kept
from .pulse import read_pulse, shared_memory

STACKS_SECONDS = 0.7  # for a rank to write its stacks down and to say what it waits in
_TAIL_BYTES = 8192


class Charge:
    """One rank.

    Attributes:
        errors: descriptor of its stderr.
        death: descriptor that is readable when it has ended.
        code: its exit code, negative for a signal, when it has ended.
    """

    def __init__(self, process: int, errors: int, files: dict[str, int]) -> None:
        self.process, self.errors, self.death = process, errors, os.pidfd_open(process)
        self.code = 0
        self._pulse, self._words, self._stacks = files["pulse"], files["words"], files["stacks"]
        self._questions, self._answers = files["questions"], files["answers"]
        self._tail, self._read_stacks = b"", 0
        self._frozen_since: float | None = None
        self._stacks_due: float | None = None
        self._beat: dict[str, Any] = {}

    @classmethod
    def start(cls) -> Charge | None:
        """Forks; None in the new process, which is the rank."""
        files = {"pulse": shared_memory(), "words": os.memfd_create("words"), "stacks": os.memfd_create("stacks")}
        (asked, questions), (answers, answered), (errors, written) = os.pipe(), os.pipe(), os.pipe()
        keeper = os.getpid()
        signal.signal(ASK_FOR_STACKS, signal.SIG_IGN)  # and so in the rank, until it can answer
        if process := os.fork():
            for end in (asked, answered, written):
                os.close(end)
            os.set_blocking(answers, False)
            os.set_blocking(errors, False)
            return cls(process, errors, {**files, "questions": questions, "answers": answers})
        for end in (questions, answers, errors):
            os.close(end)
        begin_kept(keeper, questions=asked, answers=answered, errors=written, **files)
        return None

    def ended(self) -> bool:
        if self.process and os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self._beat = self.pulse()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process, signal.SIGKILL)  # what it has started
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
            self.process = 0
        return not self.process

    def ask_to_stop(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            os.killpg(self.process, signal.SIGKILL)
        self._signal(signal.SIGKILL)  # if it is so new that it has no group

    def _signal(self, number: int) -> None:
        if self.process:
            with contextlib.suppress(OSError):
                os.kill(self.process, number)

    def pulse(self) -> dict[str, Any]:
        """Its phase, step and seconds since its last beat, and for how long it has been stopped by a signal."""
        beat, now = read_pulse(self._pulse), time.monotonic()
        if self._state() != "T":
            self._frozen_since = None
        elif self._frozen_since is None:
            self._frozen_since = now
        frozen = 0.0 if self._frozen_since is None else now - self._frozen_since
        return {**vars(beat), "frozen": frozen}

    def _state(self) -> str:
        try:
            with open(f"/proc/{self.process}/stat", "rb") as stat:
                return stat.read().rpartition(b")")[2].split()[0].decode()
        except OSError:
            return "X"

    def ask_for_stacks(self) -> None:
        """It writes them down by itself; `stacks_if_ready` has them a moment later."""
        self._signal(ASK_FOR_STACKS)
        with contextlib.suppress(OSError):
            os.write(self._questions, b"?")
        self._stacks_due = time.monotonic() + STACKS_SECONDS

    def stacks_if_ready(self) -> dict[str, Any] | None:
        """Its Python stacks as text, and the collective it waits in: None if it did not say."""
        if self._stacks_due is None or time.monotonic() < self._stacks_due:
            return None
        if self._frozen_since is not None:  # it is set going when the others have told; it will be ended soon
            self._signal(signal.SIGCONT)
            self._frozen_since, self._stacks_due = None, time.monotonic() + STACKS_SECONDS / 2
            return None
        self._stacks_due = None
        try:
            waiting = json.loads(os.read(self._answers, 1 << 16).split(b"\n")[0])
        except (OSError, ValueError):
            waiting = None
        return {"stacks": self._new_stacks(), "waiting": waiting}

    def _new_stacks(self) -> str:
        text = os.pread(self._stacks, 1 << 18, self._read_stacks)
        self._read_stacks += len(text)
        return text.decode(errors="replace")

    def pass_errors_on(self) -> bool:
        """Its stderr goes to this process's own, and the end of it is kept; False when it is closed."""
        try:
            while data := os.read(self.errors, 1 << 16):
                self._tail = (self._tail + data)[-_TAIL_BYTES:]
                with contextlib.suppress(OSError):  # whoever read it may be gone
                    os.write(2, data)
        except BlockingIOError:
            return True
        return False

    def last_words(self) -> dict[str, Any]:
        """How it ended: exit code, phase, its own words, the end of its stderr, the stack of a crash."""
        self.pass_errors_on()
        content = os.pread(self._words, 1 << 20, 0)
        words = json.loads(content) if content else {"text": "", "consequence": False}
        tail = self._tail.decode(errors="replace")
        return {**self._beat, "code": self.code, **words, "tail": tail, "stacks": self._new_stacks()}

    def say_here(self, why: str) -> None:
        """On this host's stderr, where there is no launcher to tell."""
        content = os.pread(self._words, 1 << 20, 0)
        text = json.loads(content)["text"] if content else why
        with contextlib.suppress(OSError):
            print(f"rank {os.environ.get('RANK', '0')} ended: {text}", file=sys.stderr, flush=True)
