"""One rehearsal: a launch on several hosts comes to harm, and what becomes of it is measured."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import psutil

from ...trainer.keeper.wire import LAUNCH_FOLDER
from .faults import FAULTS, processes_of
from .netns import VirtualHost
from .rank import HARM, Harm

ARRIVE_SECONDS = 400.0  # for the launch to get to the place of the harm
ENOUGH_SECONDS = 60.0
LEFT_SECONDS = 15.0  # for the last process to be gone


@dataclass(frozen=True)
class Outcome:
    """What became of a launch.

    Attributes:
        seconds: from the harm to its end; None if it did not end.
        code: the launch's exit code.
        left: processes of it, on any host, that were there 15 s after the harm, and after the launch's end.
        last: the last line that it said.
        right: whether that names what happened, where and to which rank.
    """

    harm: Harm
    seconds: float | None
    code: int | None
    left: int
    last: str
    right: bool


def rehearse(
    command: Sequence[str],
    host: VirtualHost,
    where: str,
    harm: Harm,
    act: Callable[[subprocess.Popen | None], AbstractContextManager[object]] = lambda _: contextlib.nullcontext(),
    environment: Mapping[str, str] | None = None,
    end_seconds: float = ENOUGH_SECONDS,
    gone_on: Callable[[], bool] | None = None,
) -> Outcome:
    """Runs a launch until it has come to harm and ended.

    Args:
        command: the launch, to be run on `host` in the harm's folder.
        where: the name of the host on which the harmed rank is.
        act: does the harm from outside, when a rank has told that the moment has come, or before the launch; undone
            when all is over.
        gone_on: whether the run has gone on for long enough after a fault that does not end it; then it is asked to
            stop.
    """
    fault = FAULTS[harm.fault]
    harm.moment.unlink(missing_ok=True)
    variables = {**os.environ, **(environment or {}), HARM: harm.write()}
    log = Path(harm.folder) / "said"
    with log.open("w") as said, contextlib.ExitStack() as undo:
        if fault.before:
            undo.enter_context(act(None))
        happened = time.time()
        words = host.command(["env", "-u", LAUNCH_FOLDER, *command])
        launch = subprocess.Popen(words, cwd=harm.folder, stdout=said, stderr=said, env=variables)
        try:
            if not fault.before:
                happened = _wait_for(harm, launch)
                undo.enter_context(act(launch))
            if gone_on is not None:
                _wait_until(gone_on, launch, end_seconds)
                launch.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                launch.wait(end_seconds)
            seconds = time.time() - happened if launch.poll() is not None else None
            while (left := processes_of(harm.folder)) and time.time() - happened < LEFT_SECONDS:
                time.sleep(0.2)
        finally:
            launch.kill()
            for process in processes_of(harm.folder):
                with contextlib.suppress(psutil.Error):
                    process.kill()
    return _outcome(harm, where, seconds, launch.wait(), len(left), log.read_text(errors="replace"))


def _wait_until(true: Callable[[], bool], launch: subprocess.Popen, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true() and launch.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)


def _outcome(harm: Harm, where: str, seconds: float | None, code: int, left: int, said: str) -> Outcome:
    last = (said.strip().splitlines() or [""])[-1]
    place = rf"step {harm.step + 1}" if harm.phase == "step" else harm.phase
    expected = FAULTS[harm.fault].says.format(rank=harm.rank, host=re.escape(where), place=place)
    return Outcome(harm, seconds, None if seconds is None else code, left, last, bool(re.match(expected, last)))


def _wait_for(harm: Harm, launch: subprocess.Popen) -> float:
    deadline = time.monotonic() + ARRIVE_SECONDS
    while not harm.moment.exists() or not harm.moment.read_text():
        if launch.poll() is not None or time.monotonic() > deadline:
            said = (Path(harm.folder) / "said").read_text(errors="replace")
            raise RuntimeError(f"the launch did not get to {harm.phase}: {said[-2000:]}")
        time.sleep(0.05)
    return float(harm.moment.read_text())


def other_launches() -> list[int]:
    """Processes that `deepspeed`, asked to end, would end too: its clean-up is `pkill -f PYTHON -u -m its launcher`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            ours = bool(words) and Path(words[0]).parent == Path(sys.executable).parent
            if ours and "deepspeed.launcher.launch" in words:
                found.append(process.pid)
    return found


def launch_words(recipe: str, config: str, hostfile: str, overrides: Sequence[str], *options: str) -> list[str]:
    """The command of a supervised launch whose ranks come to harm."""
    start = [sys.executable, "-m", "zeropipe.launcher.rehearsal.start", recipe, *overrides]
    return [*start, "--deepspeed_config", config, "--hostfile", hostfile, *options]


def plain_words(recipe: str, config: str, hostfile: str, overrides: Sequence[str], address: str) -> list[str]:
    """The same by `deepspeed` alone."""
    program = str(Path(sys.executable).parent / "deepspeed")
    words = [
        program,
        "--hostfile",
        hostfile,
        "--master_addr",
        address,
        "--module",
        "zeropipe.launcher.rehearsal.rank",
        "--run",
        recipe,
    ]
    return [*words, "--deepspeed_config", config, *overrides]
