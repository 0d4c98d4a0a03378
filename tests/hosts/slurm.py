"""A real Slurm on the test hosts: its controller on the first, where commands of it are run too, a daemon on each."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from zeropipe.launcher.rehearsal.netns import VirtualHost

DAEMONS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "salloc")
SETTINGS = """\
ClusterName=zeropipe
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SlurmUser=root
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
"""


def what_slurm_lacks() -> str | None:
    absent = [program for program in DAEMONS if shutil.which(program) is None]
    return f"not installed: {', '.join(absent)} (Debian's slurmctld, slurmd, slurm-client, munge)" if absent else None


@contextlib.contextmanager
def slurm_on(hosts: Sequence[VirtualHost]) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands find it."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as undo:
        folder, cores = Path(name), os.cpu_count()
        nodes = [f"NodeName={host.name} NodeAddr={host.address} CPUs={cores}\n" for host in hosts]
        (folder / "slurm.conf").write_text(
            SETTINGS.format(folder=folder) + f"SlurmctldHost={hosts[0].name}({hosts[0].address})\n" + "".join(nodes)
            + "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
        )  # fmt: skip
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o400)
        environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        log = undo.enter_context((folder / "said").open("w"))

        def begin(words: Sequence[str]) -> None:
            daemon = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
            undo.callback(daemon.wait, 20)
            undo.callback(daemon.terminate)

        files = [f"--{what}={folder}/{file}" for what, file in (
            ("socket", "munge.sock"), ("key-file", "key"), ("pid-file", "munge.pid"), ("seed-file", "seed"),
            ("log-file", "munge.log"))]  # fmt: skip
        begin(["munged", "--foreground", "--force", *files])
        for made in ("state", *(f"spool-{host.name}" for host in hosts)):
            (folder / made).mkdir()
        begin(hosts[0].command(["slurmctld", "-D", "-i"]))
        for host in hosts:  # inside a namespace nothing is mounted there, and slurmd wants something
            daemon = f"mount -t tmpfs none /sys/fs/cgroup; exec slurmd -D -N {host.name}"
            begin(host.command(["sh", "-c", daemon]))
        _wait_until_idle(hosts, environment, folder / "said")
        yield environment


def _wait_until_idle(hosts: Sequence[VirtualHost], environment: dict[str, str], log: Path) -> None:
    deadline = time.monotonic() + 60
    while hosts[0].run(["sinfo", "-h", "-o", "%t %D"], env=environment).stdout.strip() != f"idle {len(hosts)}":
        if time.monotonic() > deadline:
            raise RuntimeError(f"Slurm does not begin: {log.read_text()[-2000:]}")
        time.sleep(0.5)
