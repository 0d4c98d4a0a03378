"""The faults that a rehearsal knows: where each can happen, how it is done, and what a launch has to make of it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from ...trainer.keeper.pulse import PHASES, STEP
from .netns import VirtualHost
from .rank import HARM

EVAL_EVERY, SAVE_EVERY = 6, 4  # steps of what is rehearsed

START = "start"  # the phase before a rank begins
ENDS, GOES_ON, REFUSED = "ends", "goes on", "refused"
TOO_MANY = (os.cpu_count() or 1) + 8  # slots


def processes_of(folder: str | Path) -> list[psutil.Process]:
    """Processes on any host of this machine that a launch in this folder has started, and itself."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            environ = process.environ()
            if environ.get(HARM, "").startswith(str(folder)) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@dataclass(frozen=True)
class Scene:
    """What a fault is done to: a host, by a launch in `folder` whose run directory is `output`."""

    host: VirtualHost
    folder: Path
    output: Path
    random: random.Random
    notes: list[str] = field(default_factory=list)  # what was chosen


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        phases: where it can happen.
        says: the launch's last line, a regular expression with {rank}, {host}, {place}.
        outcome: of the launch: it `ENDS`, it `GOES_ON` as if nothing had been, or it is `REFUSED` before a rank begins.
        code: exit code of a launch that ends.
        act: does it from outside, and undoes it; what a rank does to itself is in `rank.py`.
        before: it is there before the launch.
        slots, environment: of the second host, of the user.
        seconds: for the launch to end, at most; of a hang, after the limit.
        lost: steps that may be in no checkpoint afterwards, at most: as many as are between two that are due, and
            those of the one that is being written.
    """

    phases: tuple[str, ...]
    says: str = ""
    outcome: str = ENDS
    code: int = 3
    act: Callable[[Scene, subprocess.Popen | None], AbstractContextManager[object]] = lambda scene, launch: (
        contextlib.nullcontext()
    )
    slots: int | None = None
    environment: tuple[tuple[str, str], ...] = ()
    seconds: float = 15.0
    lost: int = 2 * SAVE_EVERY

    @property
    def before(self) -> bool:
        return self.phases == (START,)


@contextlib.contextmanager
def _kill(_: Scene, launch: subprocess.Popen | None) -> Iterator[None]:
    assert launch is not None
    launch.send_signal(signal.SIGKILL)
    yield


@contextlib.contextmanager
def _ask_one(scene: Scene, _: subprocess.Popen | None) -> Iterator[None]:
    """SIGTERM to one process of the job, on any host: the launcher, `deepspeed`, a rank, its keeper, …

    Not to an ssh client: its end looks like a lost connection, which a run survives.
    """
    asked = [process for process in processes_of(scene.folder) if process.name() != "ssh"]
    process = scene.random.choice(sorted(asked, key=lambda process: process.pid))
    scene.notes.append("SIGTERM to " + " ".join(process.cmdline())[:120])
    process.terminate()
    yield


@contextlib.contextmanager
def _ask_all(scene: Scene, _: subprocess.Popen | None) -> Iterator[None]:
    """SIGTERM to every process of the job on every host, as from a batch system."""
    for process in processes_of(scene.folder):
        with contextlib.suppress(psutil.Error):
            process.terminate()
    yield


@contextlib.contextmanager
def _lose_connection(scene: Scene, _: subprocess.Popen | None) -> Iterator[None]:
    """The connection by which the launcher has started the ranks of a host."""
    for process in processes_of(scene.folder):
        if process.name() == "ssh" and scene.host.name in process.cmdline():
            process.kill()
    yield


@contextlib.contextmanager
def _fill_disk(scene: Scene, _: subprocess.Popen | None) -> Iterator[None]:
    """Where checkpoints are to be, this host sees a file system that takes nothing more."""
    from ...trainer.checkpoint.folder import CHECKPOINTS

    where = scene.output / CHECKPOINTS
    where.mkdir(parents=True, exist_ok=True)
    with scene.host.own_folder(where, "4k"):
        yield


@contextlib.contextmanager
def _other_version(scene: Scene, _: subprocess.Popen | None) -> Iterator[None]:
    (metadata,) = Path(sys.prefix).glob("lib/python*/site-packages/deepspeed-*.dist-info/METADATA")
    with scene.host.own_file(metadata, "Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.9.9\n"):
        yield


def _refused(says: str, **rest) -> Fault:
    return Fault((START,), rf"\s*{says}", REFUSED, 2, **rest)


HERE = r"rank {rank} on {host}"
FAULTS = {
    "exception": Fault(PHASES, rf"error: {HERE} failed: RehearsedError: raised on purpose, in {{place}}"),
    "exit": Fault(PHASES, rf"error: {HERE} ended with exit code 9 without a word, in {{place}}"),
    "kill": Fault(PHASES, rf"error: {HERE} was ended by SIGKILL .*, in {{place}}"),
    "segfault": Fault(PHASES, rf"error: {HERE} was ended by SIGSEGV, in {{place}}"),
    "stop": Fault(PHASES, rf"error: {HERE} was stopped by a signal \(SIGSTOP\) .*, in {{place}}"),
    "hang": Fault((STEP,), rf"error: {HERE} hangs in {{place}}: .*"),
    "pause": Fault(PHASES[1:], outcome=GOES_ON, lost=0),
    "link-down": Fault(
        PHASES,
        rf"error: {HERE} has not been heard for \d+ s: its host is down or cut off; .*",
        act=lambda scene, launch: scene.host.cut_off(),
    ),
    "link-slow": Fault((STEP,), outcome=GOES_ON, lost=0, act=lambda scene, launch: scene.host.slow_link("4mbit")),
    "host-gone": Fault(
        PHASES, rf"error: {HERE} (is gone|has not been heard).*", act=lambda scene, launch: scene.host.gone()
    ),
    "sshd-stopped": Fault(PHASES, outcome=GOES_ON, lost=0, act=lambda scene, launch: scene.host.without_sshd()),
    "ssh-lost": Fault(PHASES, outcome=GOES_ON, lost=0, act=_lose_connection),
    "disk-full": Fault(
        (STEP,),
        r"error: .*No space left on device \(on rank {rank}\).*",
        code=2,
        act=_fill_disk,
        seconds=60.0,
        lost=2 * SAVE_EVERY + 3,
    ),
    "sigterm": Fault(PHASES, code=4, act=_ask_one, lost=0),
    "sigterm-all": Fault(PHASES, code=4, act=_ask_all, lost=0),
    "launcher-killed": Fault(PHASES, code=-signal.SIGKILL, act=_kill),
    "wrong-version": _refused("{host}: deepspeed 0.9.9, but .*", act=_other_version),
    "no-environment": _refused(
        f"{{host}}: there is no {sys.executable}.*", act=lambda scene, launch: scene.host.own_folder(Path(sys.prefix))
    ),
    "wrong-interface": _refused(
        "{host}: GLOO_SOCKET_IFNAME=aaa0 does not lead to .*", environment=(("GLOO_SOCKET_IFNAME", "aaa0"),)
    ),
    "slot-mismatch": _refused(f"{{host}}: {TOO_MANY} slots, but .*", slots=TOO_MANY),
    "unreachable-host": _refused(
        "{host}: ssh without a password failed.*", act=lambda scene, launch: scene.host.without_sshd()
    ),
    "other-recipe": _refused(
        "{host}: .*recipe.yaml differs from the one here.*",
        act=lambda scene, launch: scene.host.own_file(scene.folder / "recipe.yaml", "name: another\n"),
    ),
}
