"""The hostfile, one `name slots=N` a line: as DeepSpeed reads it, but every slip is an error that names its line."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path

from ...data_prep.errors import UserError

# DeepSpeed searches for `^(\S+)\s+slots=(\d+)` and ignores the rest; of that, only MPI's `max_slots` is let pass here
LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>\d+)(\s+max[-_]slots=\d+)?\s*(#.*)?")
_NAME = re.compile(r"([A-Za-z0-9_][\w.-]*@)?[A-Za-z0-9][A-Za-z0-9.-]*")
EXAMPLE = "`node1 slots=8`"


@dataclass(frozen=True)
class Host:
    """One host and how many ranks it takes; `name` is what ssh is given (`user@name` where the user differs).

    `devices`: the numbers of those it uses, where only some were asked for.
    """

    name: str
    slots: int
    devices: tuple[int, ...] | None = None


def read_hostfile(path: str | Path) -> tuple[Host, ...]:
    """The hosts of a hostfile, in order: ranks are numbered by it.

    Raises:
        UserError: the file is missing (DeepSpeed would train on this machine alone) or empty, or a line is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8") if Path(path).is_file() else None
    except (OSError, UnicodeDecodeError):
        text = None
    if text is None:
        raise UserError(f"hostfile {path}: no such text file; write one {EXAMPLE} a line (see hostfile.example)")
    lines: dict[str, int] = {}
    hosts = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        host = _parse(line, f"hostfile {path}, line {number}")
        if host.name in lines:
            raise UserError(
                f"hostfile {path}, line {number}: {host.name} is on line {lines[host.name]} already; "
                "give each host one line with all its slots"
            )
        lines[host.name] = number
        hosts.append(host)
    if not hosts:
        raise UserError(f"hostfile {path}: no host in it; write one {EXAMPLE} a line")
    return tuple(hosts)


def _parse(line: str, where: str) -> Host:
    match = LINE.fullmatch(line)
    if not match:
        raise UserError(f"{where}: cannot read '{line}'; expected the host's name and its ranks, such as {EXAMPLE}")
    name, slots = match["name"], int(match["slots"])
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{where}: '{name}' is not a host name; ranges such as node[1-4] must be written out, one host a line, "
            "and an IPv6 address needs a name in /etc/hosts"
        )
    if slots == 0:
        raise UserError(f"{where}: {name} has no slots; give it one or more, or remove the line")
    return Host(name, slots)


def is_this_machine(name: str) -> bool:
    """Whether ssh to `name` would only come back here, by its name alone."""
    return name in {"localhost", "127.0.0.1", socket.gethostname(), socket.gethostname().split(".")[0]}
