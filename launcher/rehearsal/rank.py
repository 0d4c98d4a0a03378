"""A rank that comes to harm at a given place: run by rehearsals in the place of `zeropipe.trainer`.

What to do and where is in a file that the environment names. Faults from outside (a cut link, say) are done
by whoever rehearses; here their moment is made known by a file.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ...trainer.commands.train import main
from ...trainer.keeper.keeper import under_keeper
from ...trainer.keeper.pulse import SET_UP, Pulse

HARM = "ZEROPIPE_HARM"


@dataclass(frozen=True)
class Harm:
    """What happens to which rank in which phase, there at which step (counted from 0)."""

    fault: str
    rank: int
    phase: str
    step: int
    folder: str  # for a file that says when it happened: once in a rehearsal, however often the run is restarted

    def write(self) -> str:
        """Leaves word for the ranks; returns the path, which `HARM` is to be set to."""
        path = Path(self.folder) / "harm.json"
        path.write_text(json.dumps(asdict(self)))
        return str(path)

    @property
    def moment(self) -> Path:
        return Path(self.folder) / "now"


class RehearsedError(Exception):
    """Raised on purpose."""


def _raise() -> None:
    raise RehearsedError("raised on purpose")


def _exit() -> None:
    os._exit(9)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _segfault() -> None:
    ctypes.string_at(0)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _pause() -> None:
    subprocess.Popen(["sh", "-c", f"sleep 3; kill -CONT {os.getpid()}"], start_new_session=True)
    _stop()


def _sleep() -> None:
    time.sleep(100_000)


# by a rank itself; any other fault is somebody else's to do
IN_A_RANK: dict[str, Callable[[], None]] = {
    "exception": _raise,
    "exit": _exit,
    "kill": _kill,
    "segfault": _segfault,
    "stop": _stop,
    "hang": _sleep,
    "pause": _pause,
}


def come_to_harm(harm: Harm) -> None:
    """Lets the fault happen when this rank's pulse first tells of the place."""

    def look(phase: str, step: int) -> None:
        if phase == harm.phase and (phase == SET_UP or step >= harm.step) and not harm.moment.exists():
            harm.moment.write_text(repr(time.time()))
            IN_A_RANK.get(harm.fault, lambda: None)()

    enter = Pulse._go_on

    def entering(self: Pulse, phase: str, step: int, learn: bool) -> None:
        enter(self, phase, step, learn)
        look(phase, step)

    if harm.phase == SET_UP:
        _in_set_up(lambda: look(SET_UP, 0))
    Pulse._go_on = entering


def _in_set_up(act: Callable[[], None]) -> None:
    """When the ranks have met and begin to build."""
    from ...trainer.ranks.ranks import Ranks

    lay_out = Ranks.lay_out

    def laying_out(self: Ranks, tensor: int, sequence: int, pipeline: int, expert: int = 1) -> Ranks:
        act()
        return lay_out(self, tensor, sequence, pipeline, expert)

    Ranks.lay_out = laying_out


def rehearsed() -> int:
    harm = Harm(**json.loads(Path(os.environ[HARM]).read_text()))
    if int(os.environ.get("RANK", "0")) == harm.rank:
        come_to_harm(harm)
    return main()


if __name__ == "__main__":
    code = under_keeper(rehearsed)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
