"""ssh to the hosts of a launch: never a question, never a long wait."""

from __future__ import annotations

CONNECT_SECONDS = 6
SSH_FAILED = 255
SSH_OPTIONS = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}")


def ssh_command(host: str, port: int | None, command: str) -> list[str]:
    """ssh that never asks for a password and never waits long for a host that is not there."""
    return ["ssh", *SSH_OPTIONS, *(["-p", str(port)] if port is not None else []), host, command]
