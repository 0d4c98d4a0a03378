"""One open connection to an agent on every host, all asked at once; what a host does not answer is said in words."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import shlex
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..hosts.hostfile import Host
from ..hosts.ssh import SSH_FAILED, ssh_command
from .agent import REPLY

ASKED_AT_ONCE = 256  # connections under way; each is a process here
NO_FOLDER, NO_PYTHON = 81, 82
MOST_BYTES = 1 << 24  # of one answer


@dataclass(frozen=True)
class Silence:
    """Why a host gave no answer: what is wrong, and what to do."""

    says: str
    cure: str
    check: str = "reach"


class Line(Protocol):
    """Two-way lines of text to one agent."""

    async def say(self, text: str) -> None: ...

    async def hear(self) -> str:
        """The next line; an empty one when the other side has ended."""
        ...

    async def why(self) -> Silence:
        """What the other side's end means."""
        ...

    async def close(self) -> None: ...


@dataclass
class Crew:
    """The agents of some hosts. A host that has failed once is not asked again."""

    connect: Callable[[str], Awaitable[Line]]
    lines: dict[str, Line] = field(default_factory=dict)
    silent: dict[str, Silence] = field(default_factory=dict)
    times: dict[str, tuple[float, float]] = field(default_factory=dict)  # of each host's last question and answer

    async def ask(
        self, names: Sequence[str], do: str, wait: float, own: Mapping[str, Any] | None = None, **arguments: Any
    ) -> dict[str, Any]:
        """Asks hosts at once and returns the answers of those that gave one.

        Args:
            wait: seconds for a host, its connection included.
            own: further arguments of each host, by name.
        """
        gate = asyncio.Semaphore(ASKED_AT_ONCE)

        async def one(name: str) -> Any:
            async with gate:
                with_ = {**arguments, **((own or {}).get(name) or {})}
                try:
                    return await asyncio.wait_for(self._ask(name, do, with_), wait)
                except TimeoutError:
                    said = f"no answer to '{do}' within {wait:g} seconds"
                    self.silent[name] = Silence(said, f"look at its load and its storage: ssh {name} uptime")
                    return None

        able = [name for name in names if name not in self.silent]
        answers = await asyncio.gather(*(one(name) for name in able))
        return {name: answer for name, answer in zip(able, answers, strict=True) if name not in self.silent}

    async def _ask(self, name: str, do: str, arguments: Mapping[str, Any]) -> Any:
        if name not in self.lines:
            self.lines[name] = await self.connect(name)
        line = self.lines[name]
        asked = time.time()
        await line.say(json.dumps({"do": do, "with": arguments}))
        while text := await line.hear():
            if text.startswith(REPLY):
                self.times[name] = (asked, time.time())
                answer = json.loads(text.removeprefix(REPLY))
                if "error" in answer:
                    self.silent[name] = Silence(f"'{do}' failed: {answer['error']}", "see the message")
                return answer.get("value")
        self.silent[name] = await line.why()
        return None

    async def close(self) -> None:
        await asyncio.gather(*(line.close() for line in self.lines.values()))


class ProcessLine:
    """An agent at the other end of a process of this machine: of ssh, or the agent itself."""

    def __init__(self, host: str, process: asyncio.subprocess.Process) -> None:
        self._host, self._process = host, process

    @classmethod
    async def open(cls, host: str, words: Sequence[str]) -> ProcessLine:
        pipe = asyncio.subprocess.PIPE
        environment = {**os.environ, "LC_ALL": "C"}
        process = await asyncio.create_subprocess_exec(
            *words, stdin=pipe, stdout=pipe, stderr=pipe, limit=MOST_BYTES, env=environment, start_new_session=True
        )
        return cls(host, process)

    async def say(self, text: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it has ended: `hear` finds that out
            self._process.stdin.write(f"{text}\n".encode())
            await self._process.stdin.drain()

    async def hear(self) -> str:
        assert self._process.stdout is not None
        return (await self._process.stdout.readline()).decode(errors="replace")

    async def why(self) -> Silence:
        assert self._process.stderr is not None
        said = (await self._process.stderr.read()).decode(errors="replace").strip().splitlines()
        return reason_of_end(self._host, await self._process.wait(), said[-1] if said else "it said nothing")

    async def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 1)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                self._process.kill()
            await self._process.wait()


def reason_of_end(host: str, status: int, said: str) -> Silence:
    """Why an agent ended, or never began."""
    here, python = Path.cwd(), sys.executable
    if status == SSH_FAILED:
        if "Permission denied" in said or "Host key" in said:
            return Silence(f"ssh without a password failed ({said})", f"ssh-copy-id {host}; then: ssh {host} true")
        return Silence(
            f"ssh without a password failed ({said})",
            f"`ssh {host} true` must work from here: name, port, sshd, network",
        )
    if status == NO_FOLDER:
        return Silence(f"there is no folder {here}", f"share it with {host} at the same path, or --sync", "folder")
    if status == NO_PYTHON:
        return Silence(
            f"there is no {python}", f"install the same environment there, or: rsync -a {_copied(python, host)}"
        )
    if "No module named" in said:
        return Silence(f"its environment is not whole ({said})", f"install it anew there: {python} -m pip install …")
    return Silence(f"the check ended with {status} ({said})", f"ssh {host} {python} -m {__package__}.agent </dev/null")


def _copied(python: str, host: str) -> str:
    environment = Path(python).parent.parent
    return f"{environment}/ {host}:{environment}/"


def agent_script() -> str:
    """What a host's shell is given: the agent, in this folder and of this environment."""
    here, python = shlex.quote(str(Path.cwd())), shlex.quote(sys.executable)
    script = (
        f"cd {here} 2>/dev/null || exit {NO_FOLDER}; test -x {python} || exit {NO_PYTHON}; "
        f"exec {python} -m {__package__}.agent"
    )
    return f"exec sh -c {shlex.quote(script)}"


def ssh_crew(hosts: Sequence[Host], port: int | None) -> Crew:
    """Agents reached by ssh. Opens as many files as that takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * len(hosts) + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return Crew(lambda name: ProcessLine.open(name, ssh_command(name, port, agent_script())))


def local_crew() -> Crew:
    """One agent, on this machine, without ssh."""
    return Crew(lambda name: ProcessLine.open(name, [sys.executable, "-m", f"{__package__}.agent"]))
