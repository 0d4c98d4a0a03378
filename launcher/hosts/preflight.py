"""Looks at every host before anything is started there: DeepSpeed looks at the first one only."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ...data_prep.errors import UserError
from .hostfile import Host
from .ssh import CONNECT_SECONDS, SSH_FAILED, ssh_command

NO_FOLDER, NO_PYTHON, NOT_SHARED = 81, 82, 83


def check_hosts(hosts: Sequence[Host], port: int | None, shared: Path) -> None:
    """Every host can be reached by ssh without a password, and has this folder, this Python and `shared` at its path.

    Raises:
        UserError: one line for every host that cannot take part, and what to do there.
    """
    missing = [program for program in ("ssh", "pdsh") if shutil.which(program) is None]
    if missing:
        raise UserError(f"a hostfile needs {' and '.join(missing)} here: apt-get install pdsh openssh-client")
    with ThreadPoolExecutor(min(32, len(hosts))) as pool:
        problems = [problem for problem in pool.map(lambda host: _problem(host.name, port, shared), hosts) if problem]
    if problems:
        raise UserError("\n  ".join([f"{len(problems)} of {len(hosts)} hosts cannot take part:", *problems]))


def _problem(host: str, port: int | None, shared: Path) -> str | None:
    here, python = Path.cwd(), sys.executable
    script = (
        f"test -d {shlex.quote(str(here))} || exit {NO_FOLDER}; test -x {shlex.quote(python)} || exit {NO_PYTHON}; "
        f"test -d {shlex.quote(str(shared))} || exit {NOT_SHARED}"
    )
    try:
        done = subprocess.run(
            ssh_command(host, port, script),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=3 * CONNECT_SECONDS,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        return f"{host}: ssh gave no answer in {3 * CONNECT_SECONDS} seconds"
    said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return {
        0: None,
        SSH_FAILED: f"{host}: ssh without a password failed ({said}); `ssh {host} true` must work from here",
        NO_FOLDER: f"{host}: there is no folder {here}; every host needs the one you launch from, at the same path",
        NO_PYTHON: f"{host}: there is no {python}; every host needs this environment at the same path",
        NOT_SHARED: f"{host}: {shared.parent} is not the folder it is here; the run directory must be on storage "
        "that all hosts share",
    }.get(done.returncode, f"{host}: the check ended with {done.returncode} ({said})")
