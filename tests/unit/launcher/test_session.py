"""Launches of small programs that stand in for `deepspeed` and its ranks: real processes, real signals, no torch."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from zeropipe.launcher import processes
from zeropipe.launcher.session import Session, exit_code, what_failed

# a launcher that starts two ranks and, like DeepSpeed's, ends with the status of the first that fails
LAUNCHER = """
import os, subprocess, sys
ranks = [subprocess.Popen([sys.executable, sys.argv[1]], env={**os.environ, "RANK": str(r), "LOCAL_RANK": str(r)})
         for r in (0, 1)]
sys.exit(max(abs(rank.wait()) for rank in ranks))
"""
RANK = """
import os, signal, subprocess, sys, time
from zeropipe.trainer.run.exit_notes import note_exit
def end(code):
    note_exit(code)
    sys.exit(code)
rank = os.environ["RANK"]
"""
SAVES_ON_SIGTERM = """
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), end(4)))
open(os.environ["READY"] + rank, "w").close()
time.sleep(60)
end(0)
"""
IGNORES_SIGTERM = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(os.environ["READY"] + rank, "w").close()
time.sleep(60)
"""


def start(tmp_path: Path, rank: str) -> tuple[Session, int]:
    """Runs a session with ranks of this body to its end."""
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    (tmp_path / "rank.py").write_text(RANK + rank)
    session = Session(tmp_path, ranks=2)
    environment = {**os.environ, processes.MARK: str(tmp_path), "READY": str(tmp_path / "ready-")}
    command = [sys.executable, str(tmp_path / "launcher.py"), str(tmp_path / "rank.py")]
    return session, session.run(command, environment)


def signal_me_when_ready(tmp_path: Path, *numbers: int, pause: float = 0.5) -> None:
    """Sends this process the signals once both ranks are ready."""

    def send() -> None:
        deadline = time.monotonic() + 30
        while not all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)) and time.monotonic() < deadline:
            time.sleep(0.02)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(pause)

    threading.Thread(target=send, daemon=True).start()


@pytest.fixture(autouse=True)
def nothing_left(tmp_path):
    yield
    assert processes.find_processes(str(tmp_path)) == []


def test_ranks_that_finish(tmp_path):
    assert start(tmp_path, "end(0)")[1] == 0


def test_the_users_mistake_on_one_rank_outweighs_the_crash_of_the_other(tmp_path):
    assert start(tmp_path, "end(2) if rank == '1' else os.abort()")[1] == 2


def test_a_rank_that_dies_without_a_word(tmp_path):
    assert start(tmp_path, "end(0) if rank == '1' else os.kill(os.getpid(), signal.SIGKILL)")[1] == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_stop_signal_lets_every_rank_save(tmp_path, number):
    signal_me_when_ready(tmp_path, number)
    assert start(tmp_path, SAVES_ON_SIGTERM)[1] == 4
    assert sorted(path.name for path in tmp_path.glob("exit-*")) == ["exit-00000", "exit-00001"]


def test_a_second_signal_kills_ranks_and_what_they_started(tmp_path, capfd):
    signal_me_when_ready(tmp_path, signal.SIGTERM, signal.SIGTERM)
    before = time.monotonic()
    assert start(tmp_path, IGNORES_SIGTERM)[1] == 3
    assert time.monotonic() - before < 20
    assert "error: killed on request" in capfd.readouterr().err


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    start(tmp_path, "end(0)")
    assert signal.getsignal(signal.SIGTERM) is before


def test_only_processes_of_this_launch_are_found(tmp_path):
    child = subprocess.Popen(["sleep", "30"], env={**os.environ, processes.MARK: str(tmp_path)})
    other = subprocess.Popen(
        ["sleep", "30"], env={**os.environ, processes.MARK: str(tmp_path) + "x", "LOCAL_RANK": "0"}
    )
    try:
        assert [process.pid for process in processes.find_processes(str(tmp_path))] == [child.pid]
        assert processes.find_processes(str(tmp_path), ranks_only=True) == []
        assert processes.send(str(tmp_path) + "x", signal.SIGKILL, ranks_only=True) == [other.pid]
    finally:
        for process in (child, other):
            process.kill()
            process.wait()


def test_what_failed_is_said(tmp_path, capfd):
    start(tmp_path, "end(3) if rank == '1' else os.kill(os.getpid(), signal.SIGKILL)")
    assert "rank 1 failed, see above; rank 0 of 2 ended without a word" in capfd.readouterr().err
    assert "one was ended by SIGKILL (out of memory?)" in what_failed(247, {0: 3}, 2)


@pytest.mark.parametrize(
    ("status", "notes", "stopped", "code"),
    [
        (0, {0: 0, 1: 0}, False, 0),
        (0, {0: 0}, False, 3),  # DeepSpeed ends with 0 when its launcher is killed
        (0, {}, False, 3),
        (0, {}, True, 3),
        (1, {0: 2}, False, 2),
        (4, {0: 4, 1: 4}, True, 4),
        (241, {0: 4, 1: 4}, True, 4),  # the launcher took a rank that was just leaving
        (4, {0: 4}, True, 4),  # as above, before that rank could leave its note
        (4, {0: 4, 1: 3}, True, 3),
        (4, {0: 4, 1: 4}, False, 4),  # a signal sent to the ranks by someone else, such as Slurm
        (143, {}, True, 4),  # asked to stop before there was anything to save
        (143, {}, False, 3),
        (247, {0: 0}, False, 3),
        (1, {0: 1, 1: 1}, False, 3),
    ],
)
def test_verdict(status, notes, stopped, code):
    assert exit_code(status, notes, 2, stopped) == code
