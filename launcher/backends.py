"""DeepSpeed's launchers of other hosts' ranks (`deepspeed --launcher`): what each needs, lacks and has to be told.

pdsh passes words and variables through shells, quoted by `command`. The others hand both on as they are, but
DeepSpeed's runners for them take no choice of devices, no port for ssh, and, but for Open MPI's, no Python module.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data_prep.errors import UserError
from .hosts.hostfile import Host

PDSH, OPENMPI, MPICH, SLURM = "pdsh", "openmpi", "mpich", "slurm"
RUN_MODULE = Path(__file__).with_name("run_module.py")


@dataclass(frozen=True)
class Backend:
    """What one of them needs.

    Attributes:
        programs: to be found here; `package` has them.
        version: pattern of what `mpirun --version` says of the right one: a machine may have several.
        files_only: it starts Python files, no modules.
        alike: it wants as many ranks on every host.
    """

    programs: tuple[str, ...]
    package: str
    version: str = ""
    files_only: bool = False
    alike: bool = False


BACKENDS = {
    PDSH: Backend(("pdsh",), "pdsh"),
    OPENMPI: Backend(("mpirun", "ompi_info"), "openmpi-bin", version="Open MPI|OpenRTE"),
    # DeepSpeed gives `python -m` the path of a helper of its own, and srun no `-m` at all
    MPICH: Backend(("mpirun",), "mpich", version="HYDRA", files_only=True, alike=True),
    SLURM: Backend(("srun", "sinfo"), "slurm-client", files_only=True, alike=True),
}
# DeepSpeed sends variables with these beginnings by itself, in quotes where a shell would need them
SENT_BY_DEEPSPEED = ("PYTHON", "MLFLOW", "MV2", "UCX", "NCCL")


def check_backend(name: str, hosts: Sequence[Host], ssh_port: int | None) -> None:
    """Refuses what DeepSpeed's runner for it cannot do.

    Raises:
        UserError: devices of a host were chosen, hosts differ in slots where they must not, a port for ssh.
    """
    if name == PDSH:
        return
    if ssh_port is not None:
        raise UserError(f"--ssh_port goes with pdsh only; for {name} write `Port {ssh_port}` into ~/.ssh/config")
    for host in hosts:
        if host.devices not in (None, tuple(range(host.slots))):
            raise UserError(
                f"--launcher {name} cannot choose devices of a host ({host.name}: {list(host.devices or ())}); "
                "choose whole hosts, or use pdsh"
            )
    slots = {host.slots for host in hosts}
    if BACKENDS[name].alike and len(slots) > 1:
        raise UserError(
            f"--launcher {name} starts as many ranks on every host, but the hosts have {sorted(slots)} slots; "
            "give all the same, or use pdsh or openmpi"
        )


def check_programs(name: str) -> None:
    """What it needs is on this machine.

    Raises:
        UserError: a program is missing, or `mpirun` is another MPI's.
    """
    backend = BACKENDS[name]
    missing = [program for program in ("ssh", *backend.programs) if shutil.which(program) is None]
    if missing:
        packages = f"{backend.package} openssh-client"
        raise UserError(f"--launcher {name} needs {' and '.join(missing)} here: apt-get install {packages}")
    if backend.version:
        done = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False)
        if not re.search(backend.version, done.stdout):
            said = (done.stdout.strip().splitlines() or ["nothing"])[0]
            raise UserError(
                f"--launcher {name}: the first mpirun of PATH is another one ({shutil.which('mpirun')} says '{said}'); "
                f"put {backend.package}'s before it"
            )


def check_variables(name: str, environ: Mapping[str, str]) -> None:
    """Refuses values that would reach the ranks changed.

    Raises:
        UserError: DeepSpeed would put one into quotes that no shell takes off again; srun would split it at a comma.
    """
    plain = r"[\w@%+=:./-]*" if name == SLURM else r"[\w@%+=:,./-]*"
    for variable in sorted(environ):
        if variable.startswith(SENT_BY_DEEPSPEED) and not re.fullmatch(plain, environ[variable].strip()):
            raise UserError(
                f"{variable}={environ[variable]}: DeepSpeed hands it on changed with --launcher {name}; unset it, or "
                "use pdsh"
            )


def launcher_arguments(name: str, hosts: Sequence[Host], variables: Sequence[str]) -> list[str]:
    """Words for `mpirun` or `srun` beside DeepSpeed's own; `variables`: names of those that the ranks are to get."""
    if name == OPENMPI:
        # host by host, as a hostfile numbers ranks, and not each bound to one core
        words = ["--map-by", "slot", "--bind-to", "none"]
        return words + [word for variable in variables for word in ("-x", variable)]
    if name == SLURM:  # DeepSpeed says how many ranks there are, and where only after --include; all variables go along
        names = ",".join(host.name for host in hosts)
        where = [f"--nodes={len(hosts)}", f"--ntasks-per-node={hosts[0].slots}", f"--nodelist={names}"]
        return [*where, "--kill-on-bad-exit=1"]
    return []


def rank_words(name: str, module: str) -> list[str]:
    """What `deepspeed` is told to run, so that each rank runs this module."""
    return [str(RUN_MODULE), module] if BACKENDS[name].files_only else ["--module", module]


def given_words(words: Sequence[str], further: str) -> list[str]:
    """`--launcher_args` of these words and the user's own."""
    text = " ".join(part for part in (shlex.join(words), further) if part)
    return [f"--launcher_args={text}"] if text else []
