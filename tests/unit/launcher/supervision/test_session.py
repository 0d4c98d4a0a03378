"""Launches of small programs that stand in for `deepspeed` and its ranks: real processes, real signals, no torch."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from zeropipe.launcher.supervision import processes
from zeropipe.launcher.supervision.session import Session
from zeropipe.launcher.supervision.watch import Patience
from zeropipe.trainer.keeper.wire import LAUNCH_FOLDER

# a launcher that starts two ranks and, like DeepSpeed's, ends the others when one fails, and with its status
LAUNCHER = """
import os, signal, subprocess, sys, time
ranks = [subprocess.Popen([sys.executable, sys.argv[1]], env={**os.environ, "RANK": str(r), "LOCAL_RANK": str(r)})
         for r in (0, 1)]
def end(status):
    for rank in ranks:
        rank.terminate()
    deadline = time.monotonic() + 2  # DeepSpeed's: 30 s
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    for rank in ranks:
        rank.kill()
    sys.exit(status)
signal.signal(signal.SIGTERM, lambda *_: end(1))
while any(rank.poll() is None for rank in ranks):
    if status := next((abs(r.returncode) for r in ranks if r.poll()), 0):
        end(status)
    time.sleep(0.05)
"""
RANK = """
import ctypes, os, signal, subprocess, sys, time
from zeropipe.trainer.keeper.keeper import under_keeper
from zeropipe.trainer.keeper.kept import say_last
from zeropipe.trainer.keeper.pulse import EVALUATION, SAVING, SET_UP, Pulse
rank = os.environ["RANK"]
def ready():
    open(os.environ["READY"] + rank + ".new", "w").write(str(os.getpid()))
    os.rename(os.environ["READY"] + rank + ".new", os.environ["READY"] + rank)
def fail(text, **how):
    say_last(text, **how)
    return 3
def body():
    pulse = Pulse.of_this_rank()
    {body}
    return 0
if __name__ == "__main__":
    os._exit(under_keeper(body))
"""
SAVES = """
    pulse.step(7)
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    ready()
    while not asked:
        time.sleep(0.01)
    with pulse.during(SAVING, learn=False):
        time.sleep({seconds})
    open(os.environ["READY"] + "saved" + rank, "w").close()
    return 4
"""
WAITS = """
    pulse.step(7)
    ready()
    time.sleep(100)
"""


def start(tmp_path: Path, body: str, **options) -> int:
    """Runs a session with ranks of this body to its end."""
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    (tmp_path / "rank.py").write_text(RANK.replace("{body}", body.strip()))
    environment = {**os.environ, LAUNCH_FOLDER: str(tmp_path), "READY": str(tmp_path / "ready-")}
    command = [sys.executable, str(tmp_path / "launcher.py"), str(tmp_path / "rank.py")]
    return Session(tmp_path, range(2), **options).run(command, environment)


def when_ready(tmp_path: Path, act) -> None:
    """Calls `act` with the process ids of both ranks once they are ready."""

    def wait() -> None:
        files = [tmp_path / f"ready-{rank}" for rank in (0, 1)]
        deadline = time.monotonic() + 60
        while not all(file.exists() for file in files) and time.monotonic() < deadline:
            time.sleep(0.02)
        try:
            act(*(int(file.read_text()) for file in files))
        except Exception:
            processes.kill(str(tmp_path))  # the test then fails, and does not hang
            raise

    threading.Thread(target=wait, daemon=True).start()


@pytest.fixture(autouse=True)
def nothing_left(tmp_path):
    yield
    assert processes.find_processes(str(tmp_path)) == []


def test_ranks_that_finish(tmp_path, capfd):
    assert start(tmp_path, "print('done', rank, flush=True)") == 0
    out, err = capfd.readouterr()
    assert sorted(out.split("\n")) == ["", "done 0", "done 1"]
    assert err == ""


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL (out of memory?), in step 8"),
        ("os._exit(9)", "ended with exit code 9 without a word, in step 8"),
        ("ctypes.string_at(0)", "was ended by SIGSEGV, in step 8"),
        ("return fail('Traceback …' + chr(10) + 'ValueError: own')", "failed: ValueError: own, in step 8"),
    ],
)
def test_the_rank_that_fails_first_is_named_last(tmp_path, capfd, harm, said):
    """Though the other, which lost it, was heard before."""
    body = f"""
    pulse.step(7)
    dying = os.environ["READY"] + "dying"
    if rank == "0":
        while not os.path.exists(dying):
            time.sleep(0.01)
        return fail("rank 0 lost another rank", consequence=True)
    open(dying, "w").close()
    time.sleep(0.3)
    sys.stderr.write("on stderr" + chr(10)); sys.stderr.flush()
    {harm}
    """
    assert start(tmp_path, body) == 3
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"error: rank 1 on {os.uname().nodename} {said}. The same command resumes")


def test_what_a_rank_said_comes_before(tmp_path, capfd):
    body = """
    if rank == "0":
        time.sleep(60)
    os.write(2, b"terminate called")
    os._exit(1)
    """
    assert start(tmp_path, body) == 3
    assert "said:\nterminate called" in capfd.readouterr().err


def test_the_users_mistake_on_one_rank_outweighs_the_crash_of_the_other(tmp_path, capfd):
    body = "if rank == '0': os.abort()\n    say_last('error: yours (on rank 1)')\n    return 2"
    assert start(tmp_path, body) == 2
    assert capfd.readouterr().err.strip().splitlines()[-1] == "error: yours (on rank 1)"


def test_a_rank_stopped_for_good_and_the_stacks_of_all(tmp_path, capfd):
    when_ready(tmp_path, lambda _, second: os.kill(second, signal.SIGSTOP))
    assert start(tmp_path, WAITS) == 3
    told = capfd.readouterr().err
    assert last_line(told).startswith(f"error: rank 1 on {os.uname().nodename} was stopped by a signal (SIGSTOP)")
    assert "rank 0 on" in told or "ranks 0, 1 on" in told  # those that wait in the same place are told once
    assert "rank 1 on" in told
    assert 'rank.py", line ' in told


def test_a_rank_stopped_for_a_moment_goes_on(tmp_path):
    def stop(_: int, second: int) -> None:
        os.kill(second, signal.SIGSTOP)
        time.sleep(3)
        os.kill(second, signal.SIGCONT)

    when_ready(tmp_path, stop)
    assert start(tmp_path, "pulse.step(1)\n    ready()\n    time.sleep(5)") == 0


def test_a_rank_that_hangs_in_c(tmp_path, capfd):
    """Its pulse has stopped, and it does not answer: a C function holds Python's lock."""
    body = """
    for step in range(3):
        pulse.step(step)
        time.sleep(0.01)
    pulse.step(3)
    ctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1) if rank == "1" else time.sleep(60)
    """
    assert start(tmp_path, body, patience=Patience(least=1.0)) == 3
    told = capfd.readouterr().err
    assert last_line(told).startswith(f"error: rank 1 on {os.uname().nodename} hangs in step 4: nothing for")
    assert "it did not say what it waits for" in last_line(told)
    assert told.count("rank.py") >= 2  # stacks of both, also of the one in C


def test_a_phase_may_take_longer_than_a_step(tmp_path):
    body = """
    for step in range(3):
        pulse.step(step)
        with pulse.during(EVALUATION):
            time.sleep(0.5)
    pulse.step(3)
    with pulse.during(SAVING, learn=False):
        time.sleep(3)
    """
    assert start(tmp_path, body, patience=Patience(least=1.0)) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_stop_signal_lets_every_rank_save(tmp_path, number):
    when_ready(tmp_path, lambda *_: os.kill(os.getpid(), number))
    assert start(tmp_path, SAVES.replace("{seconds}", "0.3")) == 4
    assert len(list(tmp_path.glob("ready-saved*"))) == 2


@pytest.mark.parametrize("whose", ["launcher.py", "stand-in", "keeper", "rank"])
def test_sigterm_to_any_process_of_the_job_saves_first(tmp_path, whose):
    """However long it takes: longer here than `deepspeed`'s launcher waits before it kills."""

    def terminate(_: int, second: int) -> None:
        rank = psutil.Process(second)
        keeper = rank.parent()
        others = [p for p in processes.find_processes(str(tmp_path)) if p not in (rank, keeper)]
        launcher = next(p for p in others if "launcher.py" in p.cmdline()[1])
        standing_in = launcher.children()[1]
        {"launcher.py": launcher, "stand-in": standing_in, "keeper": keeper, "rank": rank}[whose].terminate()

    when_ready(tmp_path, terminate)
    seconds = "4" if whose == "launcher.py" else "0.3"
    body = SAVES.replace("{seconds}", seconds)
    if whose == "rank":  # real ranks agree at the end of the step
        body = body.replace(
            "while not asked:", "while not asked and not os.path.exists(os.environ['READY'] + 'saved1'):"
        )
    assert start(tmp_path, body) == 4
    assert len(list(tmp_path.glob("ready-saved*"))) == 2


def test_a_second_signal_kills_ranks_and_what_they_started(tmp_path, capfd):
    def twice(*_: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    when_ready(tmp_path, twice)
    body = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    ready()
    time.sleep(60)
    """
    before = time.monotonic()
    assert start(tmp_path, body) == 3
    assert time.monotonic() - before < 30
    assert "error: killed on request" in capfd.readouterr().err


def test_stopped_before_there_was_anything_to_save(tmp_path):
    when_ready(tmp_path, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert start(tmp_path, "ready()\n    time.sleep(60)") == 4


def test_nothing_outlives_a_launcher_that_is_killed(tmp_path):
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    (tmp_path / "rank.py").write_text(RANK.replace("{body}", WAITS.strip()))
    script = (
        "import sys; from pathlib import Path; from zeropipe.launcher.supervision.session import Session\n"
        "Session(Path(sys.argv[1]), range(2)).run([sys.executable, *sys.argv[2:]], __import__('os').environ)"
    )
    words = [sys.executable, "-c", script, tmp_path, tmp_path / "launcher.py", tmp_path / "rank.py"]
    environment = {**os.environ, LAUNCH_FOLDER: str(tmp_path), "READY": str(tmp_path / "ready-")}
    launch = subprocess.Popen([str(word) for word in words], env=environment, stderr=subprocess.DEVNULL)
    when_ready(tmp_path, lambda *_: launch.kill())
    launch.wait(60)
    deadline = time.monotonic() + 15
    while processes.find_processes(str(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_rank_that_never_begins(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(globals(), "RANK", "import no_such_module\n" + RANK)
    assert start(tmp_path, "pass") == 3
    told = capfd.readouterr().err
    assert "No module named 'no_such_module'" in told
    assert "rank 0, 1 of 2 did not begin" in last_line(told)


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    start(tmp_path, "pass")
    assert signal.getsignal(signal.SIGTERM) is before


def test_only_processes_of_this_launch_are_found(tmp_path):
    child = subprocess.Popen(["sleep", "30"], env={**os.environ, LAUNCH_FOLDER: str(tmp_path)})
    other = subprocess.Popen(["sleep", "30"], env={**os.environ, LAUNCH_FOLDER: str(tmp_path) + "x"})
    try:
        assert [process.pid for process in processes.find_processes(str(tmp_path))] == [child.pid]
        assert processes.kill(str(tmp_path) + "x") == 1
    finally:
        for process in (child, other):
            process.kill()
            process.wait()


def last_line(told: str) -> str:
    """The last line that was said."""
    return told.strip().splitlines()[-1]
