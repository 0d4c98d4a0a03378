"""Runs one launch: passes signals on to the ranks, leaves no process behind, finds out how it really ended."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ..data_prep.errors import EXIT_DONE, EXIT_RANK_FAILED, EXIT_STOPPED, EXIT_USER_ERROR
from ..trainer.run.exit_notes import read_notes
from . import processes
from .hosts.hostfile import Host
from .hosts.ssh import CONNECT_SECONDS, ssh_command

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
POLL_SECONDS = 0.2
ENDED_BY_SIGTERM = {143, 241}  # 128 + 15, and -15 as an exit status: a rank that had nothing to save yet


@dataclass
class Session:
    """One launch under way. `folder` is its own, and marks its processes; `hosts` is empty on one machine."""

    folder: Path
    ranks: int
    hosts: Sequence[Host] = ()
    ssh_port: int | None = None
    requests: list[int] = field(default_factory=list)  # signals that asked this launch to stop, in order
    reached: set[int] = field(default_factory=set)  # ids of local ranks that have been told
    told: set[str] = field(default_factory=set)  # hosts whose ranks have all been told

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Runs the command to its end and returns the exit code for the user.

        The first stop signal is passed on to every rank, which saves and stops; the second kills them.
        """
        before = {number: signal.signal(number, self._note_request) for number in STOP_SIGNALS}
        try:
            # a session of its own: Ctrl-C on the terminal reaches this process alone, which then asks the ranks
            process = subprocess.Popen(
                list(command), env=dict(environment), stdin=subprocess.DEVNULL, start_new_session=True
            )
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                if len(self.requests) > 1:
                    break
                if self.requests:
                    self._ask_to_stop()
            self._leave_nothing(process)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        notes = read_notes(self.folder)
        code = exit_code(process.returncode, notes, self.ranks, bool(self.requests))
        if code == EXIT_RANK_FAILED:
            killed = len(self.requests) > 1
            what = "killed on request" if killed else what_failed(process.returncode, notes, self.ranks)
            print(f"error: {what}. The same command resumes from the newest checkpoint", file=sys.stderr)
        return code

    def _note_request(self, number: int, _frame: object) -> None:
        if not self.requests:
            print("\nstopping: the ranks save a checkpoint first (once more: kill them)", file=sys.stderr, flush=True)
        self.requests.append(number)

    def _ask_to_stop(self) -> None:
        """Tells the ranks that have not been told; those that are still starting are told in a later round."""
        if self.hosts:
            waiting = [host for host in self.hosts if host.name not in self.told]
            answers = self._on_hosts(waiting, "SIGTERM")
            self.told |= {host.name for host, told in zip(waiting, answers, strict=True) if told >= host.slots}
            return
        for process in processes.find_processes(str(self.folder), ranks_only=True):
            if process.pid not in self.reached:
                self.reached.add(process.pid)
                process.send_signal(signal.SIGTERM)

    def _leave_nothing(self, process: subprocess.Popen) -> None:
        """Kills what is left of the launch, here and on every host; after a clean end there is nothing."""
        if process.returncode != EXIT_DONE:
            process.kill()
            process.wait()
            processes.kill(str(self.folder))
            self._on_hosts(self.hosts, "KILL")

    def _on_hosts(self, hosts: Sequence[Host], name: str) -> list[int]:
        """Signals the launch's processes on hosts; how many there were on each, 0 where the host did not answer."""
        words = [sys.executable, "-m", "zeropipe.launcher.processes", str(self.folder), name]
        command = f"cd {shlex.quote(os.getcwd())} && {shlex.join(words)}"
        with ThreadPoolExecutor(32) as pool:
            return list(pool.map(lambda host: _answer(ssh_command(host.name, self.ssh_port, command)), hosts))


def _answer(command: Sequence[str]) -> int:
    try:
        done = subprocess.run(
            list(command), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=2 * CONNECT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return 0
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip().isdigit() else 0


def what_failed(status: int, notes: Mapping[int, int], ranks: int) -> str:
    """One line on a failed launch: which ranks reported it, which were silent, and a signal where there was one."""
    reported = [rank for rank, code in sorted(notes.items()) if code not in (EXIT_DONE, EXIT_STOPPED)]
    silent = [rank for rank in range(ranks) if rank not in notes]
    parts = []
    if reported:
        parts.append(f"{_ranks(reported)} failed, see above")
    if silent:
        parts.append(f"{_ranks(silent)} of {ranks} ended without a word")
    number = -status if status < 0 else 256 - status
    if number in set(signal.Signals):
        hint = " (out of memory?)" if number == signal.SIGKILL else ""
        parts.append(f"one was ended by {signal.Signals(number).name}{hint}")
    return "; ".join(parts or ["a launcher was killed"])


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (" …" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def exit_code(status: int, notes: Mapping[int, int], ranks: int, stop_requested: bool) -> int:
    """The exit code of a launch, from the status of `deepspeed` and from what the ranks have noted.

    A rank that saw the user's mistake decides over those that it took down with it. `deepspeed` may end with 0 though
    its launcher was killed, so 0 counts only when every rank has noted it.
    """
    said = set(notes.values())
    if EXIT_USER_ERROR in said:
        return EXIT_USER_ERROR
    if said == {EXIT_DONE} and len(notes) == ranks and status == 0:
        return EXIT_DONE
    if said <= {EXIT_STOPPED, EXIT_DONE} and EXIT_STOPPED in said:
        return (
            EXIT_STOPPED  # no rank gets there before all have saved; DeepSpeed's launcher may then end the slower ones
        )
    if stop_requested and not notes and status in ENDED_BY_SIGTERM:
        return EXIT_STOPPED
    return EXIT_RANK_FAILED
