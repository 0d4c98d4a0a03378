"""An sbatch script, the `torchrun` line of each host, a Kubeflow `TrainJob`: for who starts ranks otherwise.

Ranks need no more than the variables that `torchrun` sets, and take those of `srun` for them.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from ...data_prep.errors import UserError
from ..hosts.hostfile import Host

WAYS = ("srun", "torchrun", "kubeflow")
SAVE_SECONDS = 300  # before the time limit of a batch job: the ranks save and stop
MOUNT = "work"  # name of the volume with the current folder


@dataclass(frozen=True)
class Start:
    """What is started, and where.

    `words`: of `zeropipe.trainer`, the recipe first. `hosts`: one for each node; their names matter to torchrun alone.
    `environment`: what the ranks get beside their own. `gpu`: whether a rank is an accelerator or a CPU process.
    """

    name: str
    words: Sequence[str]
    hosts: Sequence[Host]
    environment: Mapping[str, str]
    gpu: bool
    master_addr: str | None = None
    master_port: int = 29500
    image: str = "zeropipe"


def written_for(way: str, start: Start) -> str:
    """The text that starts these ranks.

    Raises:
        UserError: the way wants as many ranks on every node, and the hosts differ.
    """
    return {"srun": _srun, "torchrun": _torchrun, "kubeflow": _kubeflow}[way](start)


def _ranks_per_node(start: Start, way: str) -> int:
    slots = {host.slots for host in start.hosts}
    if len(slots) > 1:
        raise UserError(f"--via {way} starts as many ranks on every node, but the hosts have {sorted(slots)} slots")
    return slots.pop()


def _srun(start: Start) -> str:
    ranks = _ranks_per_node(start, "srun")
    gpus = [f"#SBATCH --gpus-per-node={ranks}"] if start.gpu else []
    exports = [f"export {name}={shlex.quote(value)}" for name, value in start.environment.items()]
    return "\n".join(
        [
            "#!/bin/bash",
            f"#SBATCH --job-name={start.name}",
            f"#SBATCH --nodes={len(start.hosts)}",
            f"#SBATCH --ntasks-per-node={ranks}",
            *gpus,
            "#SBATCH --output=%x-%j.log",
            f"#SBATCH --signal=TERM@{SAVE_SECONDS}",
            "#SBATCH --requeue",
            "# the ranks save and stop at that signal; the same script goes on from the newest checkpoint",
            "set -euo pipefail",
            f"cd {shlex.quote(str(Path.cwd()))}",
            *exports,
            f"srun --kill-on-bad-exit=1 {shlex.join([sys.executable, '-m', 'zeropipe.trainer', *start.words])}",
        ]
    )


def _torchrun(start: Start) -> str:
    program = Path(sys.executable).parent / "torchrun"
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in start.environment.items())
    lines = []
    for number, host in enumerate(start.hosts):
        words = [str(program), "--nnodes", len(start.hosts), "--nproc-per-node", host.slots, "--node-rank", number]
        words += ["--master-addr", start.master_addr or start.hosts[0].name, "--master-port", start.master_port]
        line = shlex.join([*map(str, words), "-m", "zeropipe.trainer", *start.words])
        lines += [f"# on {host.name}:", f"cd {shlex.quote(str(Path.cwd()))} && {exports}{' ' * bool(exports)}{line}"]
    return "\n".join(lines)


def _kubeflow(start: Start) -> str:
    ranks = _ranks_per_node(start, "kubeflow")
    line = shlex.join(["torchrun", "-m", "zeropipe.trainer", *start.words])
    inside = f"cd {shlex.quote(str(Path.cwd()))} && exec {line}"
    trainer: dict[str, object] = {
        "image": start.image,
        "numNodes": len(start.hosts),
        "numProcPerNode": ranks,
        "command": ["sh", "-c", inside],
        "env": [{"name": name, "value": value} for name, value in start.environment.items()],
    }
    if start.gpu:
        trainer["resourcesPerNode"] = {"limits": {"nvidia.com/gpu": ranks}}
    job = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": re.sub(r"[^a-z0-9-]+", "-", start.name.lower()).strip("-")[:50] or "zeropipe"},
        "spec": {
            "runtimeRef": {"name": "torch-distributed"},
            "trainer": trainer,
            "runtimePatches": [_storage_patch()],
        },
    }
    notes = (
        f"# the claim `{MOUNT}` is storage that all nodes share (ReadWriteMany), with data and runs\n"
        f"# the image: docker build -t {start.image} .\n"
    )
    return notes + yaml.safe_dump(job, sort_keys=False, width=10_000).rstrip()


def _storage_patch() -> dict[str, object]:
    """Shared storage at the current folder, /dev/shm beyond Kubernetes' 64 MiB, and time to save when a pod must go."""
    mounts = [{"name": MOUNT, "mountPath": str(Path.cwd())}, {"name": "shm", "mountPath": "/dev/shm"}]
    volumes = [
        {"name": MOUNT, "persistentVolumeClaim": {"claimName": MOUNT}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    pod = {
        "terminationGracePeriodSeconds": SAVE_SECONDS,
        "volumes": volumes,
        "containers": [{"name": "node", "volumeMounts": mounts}],
    }
    job = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    return {
        "manager": "zeropipe/launch",
        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}},
    }
