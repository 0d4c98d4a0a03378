"""Hosts from where they were given out: Slurm, an MPI or PBS node file, SkyPilot, dstack."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...data_prep.errors import UserError
from ...trainer.ranks.variables import expand_nodelist, tasks_per_node
from .hostfile import EXAMPLE, Host

SOURCES = ("slurm", "pbs", "skypilot", "dstack")


def hosts_from(source: str, environ: Mapping[str, str]) -> tuple[Host, ...]:
    """The hosts of an allocation, in its order.

    Args:
        source: one of SOURCES, or a node file: a host a line, once for each rank or with `slots=N`, `:N`.

    Raises:
        UserError: this is no such allocation, or what it says cannot be read.
    """
    if source == "slurm":
        return _slurm(environ)
    if source == "pbs":
        return _node_file(Path(_said(environ, "PBS_NODEFILE", "a PBS job")))
    if source == "skypilot":
        return _addresses(environ, "SKYPILOT_NODE_IPS", "SKYPILOT_NUM_GPUS_PER_NODE", "a SkyPilot task")
    if source == "dstack":
        return _addresses(environ, "DSTACK_NODES_IPS", "DSTACK_GPUS_PER_NODE", "a dstack task with `nodes`")
    if not Path(source).is_file():
        raise UserError(f"--hosts {source}: expected {', '.join(SOURCES)} or a node file")
    return _node_file(Path(source))


def hostfile_text(hosts: Sequence[Host]) -> str:
    """These hosts as DeepSpeed reads them."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)


def _said(environ: Mapping[str, str], name: str, where: str) -> str:
    if not environ.get(name, "").strip():
        raise UserError(f"{name} is not set: this is not inside of {where}; use --hostfile FILE")
    return environ[name]


def _slurm(environ: Mapping[str, str]) -> tuple[Host, ...]:
    """A rank for each GPU of a node, or, where none were asked for, for each task."""
    names = expand_nodelist(_said(environ, "SLURM_JOB_NODELIST", "a Slurm allocation (salloc, sbatch)"))
    gpus = environ.get("SLURM_GPUS_ON_NODE") or environ.get("SLURM_GPUS_PER_NODE", "").rpartition(":")[2]
    if gpus:
        return _alike(names, gpus, "SLURM_GPUS_ON_NODE")
    tasks = tasks_per_node(environ.get("SLURM_TASKS_PER_NODE", f"1(x{len(names)})"))
    if len(tasks) != len(names):
        raise UserError(
            f"SLURM_TASKS_PER_NODE={environ['SLURM_TASKS_PER_NODE']} counts {len(tasks)} nodes, but "
            f"SLURM_JOB_NODELIST has {len(names)}"
        )
    return tuple(Host(name, count) for name, count in zip(names, tasks, strict=True))


def _addresses(environ: Mapping[str, str], nodes: str, gpus: str, where: str) -> tuple[Host, ...]:
    return _alike(_said(environ, nodes, where).split(), environ.get(gpus, "0"), gpus)


def _alike(names: Sequence[str], slots: str, variable: str) -> tuple[Host, ...]:
    """Hosts with as many ranks each; one where there are no GPUs."""
    if not slots.isdigit():
        raise UserError(f"{variable}={slots}: expected a number")
    return tuple(Host(name, int(slots) or 1) for name in names)


def _node_file(path: Path) -> tuple[Host, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"node file {path}: no such text file") from None
    slots: Counter[str] = Counter()
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"(\S+?)(?::(\d+)|\s+(?:max[-_])?slots=(\d+)(?:\s+max[-_]slots=\d+)?)?", line)
        if not match or int(match[2] or match[3] or 1) == 0:
            raise UserError(
                f"node file {path}, line {number}: cannot read '{line}'; expected `node1`, `node1:8` or {EXAMPLE}"
            )
        slots[match[1]] += int(match[2] or match[3] or 1)
    if not slots:
        raise UserError(f"node file {path}: no host in it")
    return tuple(Host(name, count) for name, count in slots.items())
