"""Runs one launch: passes signals on to the ranks, ends all of it when a rank fails, leaves no process behind."""

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

from ...data_prep.errors import EXIT_DONE, EXIT_RANK_FAILED, EXIT_STOPPED, EXIT_USER_ERROR
from ...trainer.keeper.keeper import STOP_SIGNALS
from ..hosts.hostfile import Host
from ..hosts.ssh import ssh_command
from . import processes
from .verdict import tell
from .watch import Mishap, Patience, Watch

POLL_SECONDS = 0.1
CAUSE_SECONDS = 1.0  # for a cause behind the first failure
TELLING_SECONDS = 3.0  # for the ranks to tell their stacks
BEHIND_SECONDS = 8.0  # for the cause behind failures that only follow from another: a host must be silent that long
END_SECONDS = 2.0  # for keepers, then for `deepspeed`, to be gone
CLEAN_SECONDS = 3.0  # for a host to kill what is left there
ENDED_BY_REQUEST = {-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, 143, 130}
PDSH_ASKED_TO_END = 0  # its status after SIGTERM, and so that of `deepspeed`


@dataclass
class Session:
    """One launch under way. `folder` is its own, and marks its processes; `ranks`: the numbers of those that it starts;
    `hosts` is empty on one machine.
    """

    folder: Path
    ranks: range
    hosts: Sequence[Host] = ()
    ssh_port: int | None = None
    patience: Patience = field(default_factory=Patience)
    requests: list[int] = field(default_factory=list)  # signals that asked this launch to stop, in order
    stopping: bool = False  # the ranks have been told to save and stop
    told: set[int] = field(default_factory=set)  # which of them
    cut_off: str = ""  # why the ranks were told, where nobody had asked
    code: int = EXIT_RANK_FAILED  # the launch's, once it has ended

    @property
    def asked(self) -> bool:
        """Whether somebody wanted this launch to end."""
        return self.stopping and not self.cut_off

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Runs the command to its end and returns the exit code for the user.

        The first stop signal is passed on to every rank, which saves and stops; the second kills them. So does, to all
        ranks, the end or the hang of one; why is then said last.
        """
        watch = Watch(self.folder, self.ranks, bool(self.hosts), self.patience)
        before = {number: signal.signal(number, self._note_request) for number in STOP_SIGNALS}
        try:
            # a session of its own: Ctrl-C on the terminal reaches this process alone, which then asks the ranks
            process = subprocess.Popen(
                list(command), env=dict(environment), stdin=subprocess.DEVNULL, start_new_session=True
            )
            mishaps = self._until_something_ends(watch, process)
            mishaps = self._gather(watch, mishaps)
            self._leave_nothing(watch, process)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            watch.board.close()
        self.code = self._verdict(watch, mishaps, process.returncode)
        return self.code

    def _note_request(self, number: int, _frame: object) -> None:
        if not self.requests:
            print("\nstopping: the ranks save a checkpoint first (once more: kill them)", file=sys.stderr, flush=True)
        self.requests.append(number)

    def _until_something_ends(self, watch: Watch, process: subprocess.Popen) -> list[Mishap]:
        """Until all ranks have ended, one has failed, `deepspeed` has ended without one, or all shall be killed."""
        while len(self.requests) < 2:
            watch.hear(POLL_SECONDS)
            if mishaps := watch.look():
                return mishaps
            if watch.all_ended():
                break
            if process.poll() is not None and not self._go_on_without(watch, process.returncode):
                break
            if (self.requests or watch.asked) and not self.stopping:
                self._stop(watch)
            elif self.stopping:
                self._stop_late_comers(watch)
        return []

    def _go_on_without(self, watch: Watch, status: int) -> bool:
        """`deepspeed` has ended before the ranks: they save and stop, for nobody sees what they print any more."""
        if not watch.running:
            return False
        by_request = status in {*ENDED_BY_REQUEST, PDSH_ASKED_TO_END}
        if not self.stopping and not by_request and not watch.asked:
            self.cut_off = f"`deepspeed` ended with status {status} while its ranks were running"
        watch.asked = True
        return True

    def _stop(self, watch: Watch) -> None:
        self.stopping = True
        self._stop_late_comers(watch)

    def _stop_late_comers(self, watch: Watch) -> None:
        for rank, line in watch.board.lines.items():
            if rank not in self.told:
                self.told.add(rank)
                line.send("stop")

    def _gather(self, watch: Watch, mishaps: list[Mishap]) -> list[Mishap]:
        """Stacks of the ranks that still run, and the cause behind what was found first."""
        if not mishaps:
            return mishaps
        for member in watch.running:
            watch.board.lines[member.rank].send("stacks")
        begun = time.monotonic()
        while (waited := time.monotonic() - begun) < BEHIND_SECONDS and len(self.requests) < 2:
            watch.hear(POLL_SECONDS)
            first, *_ = watch.look()
            told = all(member.told or watch.silent(member) for member in watch.running)
            if not first.consequence and waited > CAUSE_SECONDS and told:
                break
            over = not watch.running and all(member.began for member in watch.members)
            if over or (waited > TELLING_SECONDS and not first.consequence):
                break
        return watch.causes()

    def _leave_nothing(self, watch: Watch, process: subprocess.Popen) -> None:
        """Ends what is left of the launch, here and on every host; after a clean end there is nothing."""
        watch.board.tell("end")
        deaf = any(mishap.kind == "silent" for mishap in watch.mishaps.values())
        if deaf or len(self.requests) > 1:  # `deepspeed` would wait for hosts that do not answer
            process.kill()
        deadline = time.monotonic() + END_SECONDS
        while any(not watch.silent(member) for member in watch.running) and time.monotonic() < deadline:
            watch.hear(POLL_SECONDS)
        try:
            process.wait(END_SECONDS if watch.mishaps else 10 * END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        processes.kill(str(self.folder))
        if not all(member.went_well for member in watch.members):
            silent = watch.silent_hosts()
            self._clean_hosts([host for host in self.hosts if host.name not in silent])

    def _clean_hosts(self, hosts: Sequence[Host]) -> None:
        """Not those that do not answer: the keepers there have noticed it, too, and have killed their ranks."""
        words = [sys.executable, "-m", "zeropipe.launcher.supervision.processes", str(self.folder)]
        command = f"cd {shlex.quote(os.getcwd())} && {shlex.join(words)}"
        with ThreadPoolExecutor(64) as pool:
            list(pool.map(lambda host: _on(ssh_command(host.name, self.ssh_port, command)), hosts))

    def _verdict(self, watch: Watch, mishaps: Sequence[Mishap], status: int) -> int:
        resumes = ". The same command resumes from the newest checkpoint"
        if len(self.requests) > 1:
            print(f"error: killed on request{resumes}", file=sys.stderr)
            return EXIT_RANK_FAILED
        if (member := watch.user_error()) is not None:
            print((member.end or {})["text"], file=sys.stderr)
            return EXIT_USER_ERROR
        if mishaps:
            print(tell(watch, mishaps) + resumes, file=sys.stderr)
            return EXIT_RANK_FAILED
        codes = {(member.end or {}).get("code") for member in watch.members}
        if codes == {EXIT_DONE}:
            return EXIT_DONE
        begun = any(member.began for member in watch.members)
        if watch.all_ended() or (self.stopping and not begun) or (not begun and status in ENDED_BY_REQUEST):
            if self.cut_off:
                print(f"error: {self.cut_off}; they have saved and stopped{resumes}", file=sys.stderr)
                return EXIT_RANK_FAILED
            return EXIT_STOPPED
        print(f"error: {self._not_begun(watch, status)}{resumes}", file=sys.stderr)
        return EXIT_RANK_FAILED

    def _not_begun(self, watch: Watch, status: int) -> str:
        missing = [str(member.rank) for member in watch.members if member.end is None]
        shown = ", ".join(missing[:8]) + (" …" if len(missing) > 8 else "")
        return f"`deepspeed` ended with status {status}, and rank {shown} of {len(self.ranks)} did not begin, see above"


def _on(command: Sequence[str]) -> None:
    """Runs it, for a moment: a host that does not answer ends its ranks by itself."""
    try:
        subprocess.run(list(command), stdin=subprocess.DEVNULL, capture_output=True, timeout=CLEAN_SECONDS)
    except subprocess.TimeoutExpired:
        return
