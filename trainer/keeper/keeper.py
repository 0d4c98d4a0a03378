"""The keeper of a rank: its parent, which sees it end, reads its pulse and reports to `zeropipe launch`.

`deepspeed` starts a stand-in, which ends as the rank does. Keeper and rank are out of its process tree, since
DeepSpeed's launcher kills what it has started 30 seconds after a SIGTERM, however long saving takes:

    deepspeed's launch.py → stand-in  ~ ~ ~  keeper → rank

The rank dies with its keeper, and the keeper ends when the launcher is gone: nothing trains on by itself.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ...data_prep.errors import EXIT_RANK_FAILED
from .charge import Charge
from .wire import BEAT_SECONDS, LAUNCH_FOLDER, SILENCE_SECONDS, Wire, dial

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_ROUND_SECONDS = 0.1
_STOP = b"s"


def under_keeper(rank: Callable[[], int], number: int | None = None) -> int:
    """Runs a rank and returns its exit code: under a keeper where `zeropipe launch` has started it, else right here.

    `number`: of the rank; default: RANK of the environment.

    To be called before anything has made a thread.
    """
    folder = os.environ.get(LAUNCH_FOLDER)
    if not folder:
        return rank()
    here, there = socket.socketpair()
    if first := os.fork():
        there.close()
        os.waitpid(first, 0)
        return _stand_in(here)
    here.close()
    os.setsid()
    if os.fork():
        os._exit(0)
    return _keep(Path(folder), there, rank, int(os.environ.get("RANK", "0")) if number is None else number)


def _stand_in(keeper: socket.socket) -> int:
    """Passes requests to stop on to the keeper, and ends as it says."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: keeper.send(_STOP))
    try:
        code = keeper.recv(1)
    except OSError:
        code = b""
    return code[0] if code else EXIT_RANK_FAILED


def _keep(folder: Path, stand_in: socket.socket, rank: Callable[[], int], number: int) -> int:
    """The keeper; returns in the rank alone."""
    code = EXIT_RANK_FAILED
    try:
        wire = dial(folder, {"rank": number, "host": socket.gethostname(), "pid": os.getpid()})
        charge = Charge.start()
        if charge is None:
            stand_in.close()
            return rank()
        code = Keeper(charge, wire, stand_in).run()
    except OSError as error:
        print(f"error: the launcher cannot be reached from {socket.gethostname()}: {error}", file=sys.stderr)
    with contextlib.suppress(OSError):  # DeepSpeed's launcher may have killed it meanwhile
        stand_in.send(bytes([code % 256]))
    os._exit(code)


class Keeper:
    """Looks after a rank that runs."""

    def __init__(self, charge: Charge, wire: Wire, stand_in: socket.socket) -> None:
        stand_in.setblocking(False)
        self._charge, self._wire, self._stand_in = charge, wire, stand_in
        self._told = 0.0
        self._asked = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        self._selector = selectors.DefaultSelector()
        for source in (wire, stand_in, charge.errors, charge.death):
            self._selector.register(source, selectors.EVENT_READ)

    def _note(self, *_: object) -> None:
        self._asked = True

    def run(self) -> int:
        """Until the rank has ended; returns its exit code."""
        while not self._charge.ended():
            ready = {key.fileobj for key, _ in self._selector.select(_ROUND_SECONDS)}
            if self._charge.errors in ready and not self._charge.pass_errors_on():
                self._selector.unregister(self._charge.errors)
            if self._stand_in in ready:
                self._hear_stand_in()
            self._obey()
            self._report()
            if self._wire.closed or time.monotonic() - self._wire.heard > SILENCE_SECONDS:
                self._charge.kill()
                self._charge.say_here("its launcher is gone")
                return EXIT_RANK_FAILED
        return self._last_report()

    def _hear_stand_in(self) -> None:
        word = self._stand_in.recv(64)
        self._asked |= _STOP in word
        if not word:  # DeepSpeed's launcher has not waited: the rank may still have something to save
            self._selector.unregister(self._stand_in)

    def _obey(self) -> None:
        for message in self._wire.receive():
            if message["word"] == "stop":
                self._charge.ask_to_stop()
            elif message["word"] == "stacks":
                self._charge.ask_for_stacks()
            elif message["word"] == "end":
                self._charge.kill()

    def _report(self) -> None:
        if self._asked:
            self._asked = False
            self._wire.send("asked")
        stacks = self._charge.stacks_if_ready()
        if stacks is not None:
            self._wire.send("stacks", **stacks)
        now = time.monotonic()
        if now - self._told >= BEAT_SECONDS:
            self._told = now
            self._wire.send("pulse", **self._charge.pulse())

    def _last_report(self) -> int:
        """Tells how the rank ended, and waits until the launcher has heard it: the stand-in's end sets others off."""
        self._wire.send("ended", **self._charge.last_words())
        deadline = time.monotonic() + SILENCE_SECONDS
        while time.monotonic() < deadline:
            if any(message["word"] == "heard" for message in self._wire.receive()):
                break
            if self._wire.closed:
                self._charge.say_here("its launcher is gone")
                break
            time.sleep(0.02)
        return self._charge.code
