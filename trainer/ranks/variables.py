"""Who this rank is: torchrun's variables, or those of srun and MPI turned into them."""

from __future__ import annotations

import re
import socket
import zlib
from collections.abc import Mapping, MutableMapping
from typing import Any

import psutil

from ...data_prep.errors import UserError
from .interface import is_loopback
from .ports import FIRST, LAST, free_port

MEETING = ("MASTER_ADDR", "MASTER_PORT")
# of each starter of processes: rank, number of ranks, and both on this host. srun last: in an allocation of Slurm's,
# `mpirun` has srun start its daemons, whose numbers the ranks inherit
STARTERS = {
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}  # fmt: skip
_CONNECT_SECONDS = 3


def adopt_variables(environ: MutableMapping[str, str]) -> None:
    """Adds torchrun's variables to a rank that srun or MPI started; a process that nobody numbered stays alone.

    Raises:
        UserError: the starter has said only a part of it.
    """
    if "RANK" in environ:
        missing = [name for name in ("WORLD_SIZE", *MEETING) if name not in environ]
        if missing and environ.get("WORLD_SIZE") != "1":
            raise UserError(f"RANK is set, but not {' and '.join(missing)}; torchrun, deepspeed and srun set them all")
        return
    starter = _starter(environ)
    if starter is None:
        return
    rank, world, local_rank, local_world = STARTERS[starter]
    missing = [name for name in (local_rank, local_world) if name not in environ]
    if missing:
        raise UserError(f"{starter} started this rank, but {' and '.join(missing)} is not set")
    environ.update(RANK=environ[rank], WORLD_SIZE=environ[world], LOCAL_RANK=environ[local_rank])
    environ["LOCAL_WORLD_SIZE"] = environ["LOCAL_SIZE"] = str(_here(environ, environ[local_world]))
    if any(name not in environ for name in MEETING):
        where = _slurm_meeting(environ) if starter == "srun" else _mpi_meeting(int(environ["WORLD_SIZE"]))
        environ.update(zip(MEETING, where, strict=True))


def _starter(environ: Mapping[str, str]) -> str | None:
    """Who has set all its variables, or at least a rank and their number: srun with PMI sets a part of MPICH's."""
    for needed in (4, 2):
        for starter, names in STARTERS.items():
            if all(name in environ for name in names[:needed]):
                return starter
    return None


def rank_number(environ: Mapping[str, str]) -> int:
    """The rank's number, by whoever started it; 0 for a process that nobody numbered."""
    starter = _starter(environ)
    return int(environ.get("RANK") or (environ[STARTERS[starter][0]] if starter else "0"))


def _here(environ: Mapping[str, str], tasks: str) -> int:
    """Ranks on this host; Slurm tells those of all hosts, such as `4(x2),3`."""
    counts = tasks_per_node(tasks)
    return counts[int(environ["SLURM_NODEID"])] if len(counts) > 1 else counts[0]


def _repeated(item: str) -> list[str]:
    match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
    if not match:
        raise UserError(f"cannot read '{item}' as a number of tasks; expected 4 or 4(x2)")
    return [match[1]] * int(match[2] or 1)


def tasks_per_node(text: str) -> list[int]:
    """Of Slurm's `4(x2),3`: 4, 4, 3."""
    return [int(count) for item in text.split(",") for count in _repeated(item)]


def expand_nodelist(text: str) -> list[str]:
    """The names of Slurm's short form: `gpu[01-03,7]-ib,login` are gpu01-ib, gpu02-ib, gpu03-ib, gpu7-ib and login.

    Raises:
        UserError: a bracket is not closed, or a range is none.
    """
    names, depth, start = [], 0, 0
    for at, letter in enumerate(f"{text},"):
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if depth not in (0, 1):
            break
        if letter == "," and not depth:
            names += _expand(text[start:at].strip(), text)
            start = at + 1
    if depth:
        raise UserError(f"cannot read the list of nodes '{text}': its brackets do not match")
    return names


def _expand(item: str, whole: str) -> list[str]:
    match = re.match(r"([^\[\]]*)\[([^\[\]]+)\](.*)", item)
    if not match:
        if not item or "[" in item:
            raise UserError(f"cannot read the list of nodes '{whole}': a name or a number is missing")
        return [item]
    numbers = []
    for part in match[2].split(","):
        span = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not span or int(span[2] or span[1]) < int(span[1]):
            raise UserError(f"cannot read the list of nodes '{whole}': '{part}' is no number or range of them")
        width = len(span[1])
        numbers += [f"{number:0{width}}" for number in range(int(span[1]), int(span[2] or span[1]) + 1)]
    rest = _expand(match[3], whole) if match[3] else [""]
    return [f"{match[1]}{number}{end}" for number in numbers for end in rest]


def _slurm_meeting(environ: Mapping[str, str]) -> tuple[str, str]:
    """The first node of the step, and a port that follows from the step: all ranks find the same."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise UserError("srun started this rank, but SLURM_STEP_NODELIST is not set; set MASTER_ADDR and MASTER_PORT")
    step = f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
    return expand_nodelist(nodes)[0], str(FIRST + zlib.crc32(step.encode()) % (LAST - FIRST))


def _mpi_meeting(world: int) -> tuple[str, str]:
    """An address of rank 0 that every rank has reached, and a port that is free there. Collective over MPI's world,
    which is left at the end: `mpirun` counts a rank that ends without as failed.
    """
    from mpi4py import MPI

    try:
        return _met_by_mpi(MPI, world)
    finally:
        MPI.Finalize()


def _met_by_mpi(MPI: Any, world: int) -> tuple[str, str]:

    comm = MPI.COMM_WORLD
    if comm.size != world:
        raise UserError(
            f"MPI started {world} ranks, but mpi4py sees {comm.size}: it was built with another MPI. Reinstall it "
            "(pip install --no-binary mpi4py mpi4py) or set MASTER_ADDR and MASTER_PORT"
        )
    with socket.socket() as listener:
        if comm.rank == 0:
            listener.bind(("", free_port()))
            listener.listen(1024)
        offer = (socket.gethostname(), _addresses(), listener.getsockname()[1]) if comm.rank == 0 else None
        host, addresses, port = comm.bcast(offer)
        everybody = set(comm.allgather(socket.gethostname()))
        if everybody == {host}:
            return "127.0.0.1", str(port)
        reached = comm.allgather([address for address in addresses if _reaches(address, port)])
    for address in addresses:
        if all(address in found for found in reached):
            return address, str(port)
    raise UserError(f"no address of {host} ({', '.join(addresses)}) is reached by all ranks; set MASTER_ADDR")


def _addresses() -> list[str]:
    """IPv4 addresses of this host, without its loopback."""
    found = [
        item.address for items in psutil.net_if_addrs().values() for item in items if item.family == socket.AF_INET
    ]
    return [address for address in found if not is_loopback(address)]


def _reaches(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), _CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
