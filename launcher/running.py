"""One launch, from a look at its hosts to its end: where ranks meet, what their environment is, who watches them."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..trainer.keeper.wire import LAUNCH_FOLDER
from .backends import MPICH, OPENMPI, SENT_BY_DEEPSPEED, check_programs, check_variables
from .command import (
    NOT_FORWARDED,
    Launch,
    deepspeed_command,
    forwarded_lines,
    forwarded_variables,
    is_secret,
    rank_environment,
    user_environment_files,
    user_variables,
)
from .hosts.devices import count_accelerators, cpu_cores
from .hosts.sources import hostfile_text
from .supervision.session import Session
from .supervision.watch import Patience

NO_FILE = os.devnull  # of variables, to DeepSpeed


def start(launch: Launch, output: Path, files: Sequence[str] = ()) -> int:
    """Runs the launch and returns its exit code; `files` must be the same on every host."""
    return run_once(launch, output, files, Patience()).code


def run_once(launch: Launch, output: Path, files: Sequence[str], patience: Patience) -> Session:
    """Runs the launch to its end; raises as `meeting`."""
    with launch_folder(output.absolute() if launch.remote else None) as folder:
        launch = _with_hostfile(launch, folder)
        if launch.remote:
            check_programs(launch.backend)
            launch = meeting(launch, folder, files, output)
        environment = child_environment(launch, folder)
        hosts = launch.hosts if launch.remote else ()
        session = Session(folder, launch.ranks, hosts, launch.ssh_port, patience)
        session.run(deepspeed_command(launch, sent_by_name(launch, environment)), environment)
        return session


def meeting(launch: Launch, folder: Path | None, files: Sequence[str], output: Path | None = None) -> Launch:
    """The launch with address and port for its ranks to meet at, after a look at every host.

    Raises:
        UserError: a host cannot take part.
    """
    from .doctor.quick import check_hosts

    environment = {**os.environ, **user_variables(user_environment_files(os.environ))}
    found = check_hosts(launch.hosts, launch.ssh_port, folder, files, output, launch.sync, environment)
    return replace(
        launch, master_addr=launch.master_addr or found.address, master_port=launch.master_port or found.port
    )


def _with_hostfile(launch: Launch, folder: Path) -> Launch:
    """The launch with a hostfile written into its folder, where it is not the user's own one."""
    if launch.hostfile is None or launch.hostfile.is_absolute():
        return launch
    hostfile = folder / "hostfile"
    hostfile.write_text(hostfile_text(launch.hosts), encoding="ascii")
    return replace(launch, hostfile=hostfile, selected=False)


@contextmanager
def launch_folder(shared: Path | None) -> Iterator[Path]:
    """A folder for this launch alone, removed at its end: in the run directory where other hosts must see it too."""
    made = []
    if shared is not None:
        made = [path for path in (shared, *shared.parents) if not path.exists()]
        shared.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".launch-", dir=shared))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path in made:  # a launch that has failed before its ranks wrote anything leaves no trace
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def child_environment(launch: Launch, folder: Path) -> dict[str, str]:
    """The environment of `deepspeed`: the user's, the ranks' settings, and the mark of this launch.

    Raises:
        UserError: a variable cannot be sent to other hosts as it is.
    """
    environment = {name: value for name, value in os.environ.items() if name not in {"RANK", "LOCAL_RANK"}}
    environment |= added_variables(launch)
    environment[LAUNCH_FOLDER] = str(folder)
    if launch.device_ids is not None:
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # said by --include
    if launch.remote:  # DeepSpeed would write these onto the command lines of other hosts, whatever they are
        sent = [name for name in environment if name.startswith(SENT_BY_DEEPSPEED)]
        for name in (name for name in sent if is_secret(name, environment[name])):
            del environment[name]
    if launch.shells:
        lines = forwarded_lines(environment, user_environment_files(environment))
        carrier = folder / "deepspeed_env"
        carrier.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        environment["DS_ENV_FILE"] = str(carrier)
        own = environment.get("PDSH_SSH_ARGS_APPEND", "")
        # a dead link is noticed, and nobody is asked for a password
        environment["PDSH_SSH_ARGS_APPEND"] = (
            f"{own} -o BatchMode=yes -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
        )
    elif launch.remote:
        alike = {"CUDA_VISIBLE_DEVICES"} if launch.backend == OPENMPI else NOT_FORWARDED - {"DS_ENV_FILE"}
        for name in alike:  # of this host; srun and MPICH send all that is in the environment
            environment.pop(name, None)
        check_variables(launch.backend, environment)
    return environment


def added_variables(launch: Launch) -> dict[str, str]:
    """What is added to the user's environment for `deepspeed` to hand on.

    Raises:
        UserError: a line of the user's own files of variables cannot be read.
    """
    added = rank_environment(os.environ, launch, count_accelerators(), cpu_cores())
    if launch.remote and not launch.shells:
        if launch.backend != OPENMPI:
            added.pop("DS_ACCELERATOR", None)
        # programs beside this Python: ninja, for DeepSpeed's builds
        added["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
        added |= user_variables(user_environment_files(os.environ)) | {"DS_ENV_FILE": NO_FILE}
        if launch.backend in (OPENMPI, MPICH):  # rank 0 is where the hostfile says; under Slurm, where Slurm does
            where = {"MASTER_ADDR": launch.master_addr, "MASTER_PORT": launch.master_port}
            added |= {name: str(value) for name, value in where.items() if value is not None}
    return added


def sent_by_name(launch: Launch, environment: Mapping[str, str]) -> list[str]:
    """Which variables of the environment of `deepspeed` Open MPI is told to send; DeepSpeed says others by itself."""
    wanted = {*forwarded_variables(environment), *user_variables(user_environment_files(os.environ))}
    return sorted((wanted | {"PATH", "MASTER_ADDR", "MASTER_PORT"}) & set(environment))
