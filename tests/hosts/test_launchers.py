"""DeepSpeed's other launchers, and its way without ssh, on two hosts: the losses of one host, and no rank is left."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from .conftest import BIN, losses, ranks_left, wait_for_steps
from .slurm import slurm_on, what_slurm_lacks

pytestmark = [pytest.mark.hosts, pytest.mark.slow, pytest.mark.timeout(900)]
MPIRUN = {"openmpi": "mpirun.openmpi", "mpich": "mpirun.mpich"}  # Debian has both, and one of them as `mpirun`
LAUNCH = [str(BIN / "zeropipe"), "launch", "recipe.yaml", "--deepspeed_config", "zero2", "--hostfile", "hostfile"]


@pytest.fixture(params=list(MPIRUN))
def mpi(request, tmp_path) -> tuple[str, dict[str, str]]:
    """Name of a launcher, and an environment in which its `mpirun` is the first one."""
    program = shutil.which(MPIRUN[request.param])
    if program is None:
        pytest.skip(f"needs {MPIRUN[request.param]} (Debian's openmpi-bin, mpich)")
    write_program(tmp_path / "mpirun", f'exec {program} "$@"')
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return request.param, {**os.environ, **root, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def write_program(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def test_the_losses_of_one_host(hosts, work, one_host, mpi):
    name, environment = mpi
    done = hosts[0].run([*LAUNCH, "--launcher", name, f"output={name}"], cwd=work, env=environment, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(work / name) == one_host
    assert ranks_left(hosts) == []


def test_a_rank_that_is_killed(hosts, work, mpi):
    """The launch ends with the first cause, and so do mpirun and all that it has started elsewhere."""
    name, environment = mpi
    words = [*LAUNCH, "--launcher", name, f"output={name}-killed", "duration.steps=1000000"]
    process = subprocess.Popen(
        hosts[0].command(words), cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for_steps(work / f"{name}-killed" / "metrics.jsonl", process)
        rank = ranks_on(hosts[1])[-1]
        rank.kill()
        killed = time.monotonic()
        output, _ = process.communicate(timeout=120)
        took = time.monotonic() - killed
    finally:
        process.kill()
    assert process.returncode == 3, output
    assert "error: rank 1 on node2 was ended by SIGKILL" in output.strip().splitlines()[-1]
    assert took < 40  # 15 on a machine of its own
    assert ranks_left(hosts) == []


def ranks_on(host) -> list[psutil.Process]:
    """The trainers there, the rank itself last: its keeper and that one's stand-in are its elders."""
    pids = subprocess.check_output(["ip", "netns", "pids", host.namespace], text=True).split()
    found = [psutil.Process(int(pid)) for pid in pids]
    trainers = [process for process in found if "zeropipe.trainer" in process.cmdline()]
    return sorted(trainers, key=lambda process: process.create_time())


def test_no_ssh(hosts, work, one_host):
    """The same command on every host; the name by which they meet means the loopback on its own host."""
    words = [*LAUNCH, "--no_ssh", "output=no-ssh"]
    nodes = [
        subprocess.Popen(host.command(words), cwd=work, stderr=subprocess.PIPE, stdout=sys.stderr, text=True)
        for host in hosts[:2]
    ]
    try:
        said = [node.communicate(timeout=400)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    assert losses(work / "no-ssh") == one_host


def test_no_ssh_when_a_rank_is_killed(hosts, work):
    """Every host ends what it has started: where the rank was, with the cause, elsewhere, because it is gone."""
    words = [*LAUNCH, "--no_ssh", "output=no-ssh-killed", "duration.steps=1000000"]
    nodes = [
        subprocess.Popen(host.command(words), cwd=work, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
        for host in hosts[:2]
    ]
    try:
        wait_for_steps(work / "no-ssh-killed" / "metrics.jsonl", nodes[0])
        ranks_on(hosts[1])[-1].kill()
        said = [node.communicate(timeout=120)[0].strip().splitlines()[-1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [3, 3], "\n".join(said)
    assert said[1].startswith("error: rank 1 on node2 was ended by SIGKILL")
    assert said[0].startswith("error: rank 0 on node1 failed: rank 0 lost another rank")
    assert ranks_left(hosts) == []


def test_a_dry_run_is_what_is_run(hosts, work, mpi):
    """By DeepSpeed's own launcher, which is told to run `echo` for `mpirun`."""
    name, environment = mpi
    dry = hosts[0].run([*LAUNCH, "--launcher", name, "--dry-run"], cwd=work, env=environment)
    line = dry.stdout.strip().splitlines()[-1]
    assert f"--launcher {name}" in line
    assert "--master_addr 10.77.0.1" in line, dry.stdout
    assert (work / "hostfile").read_text() == "\n".join(
        row.removeprefix("#   ") for row in dry.stdout.splitlines() if row.startswith("#   ")
    ) + "\n"
    write_program(Path(environment["PATH"].split(":")[0]) / "mpirun", 'echo ran "$@"')
    done = hosts[0].run(["bash", "-c", line], cwd=work, env=environment)
    assert done.stdout.startswith("ran -n 2"), done.stdout + done.stderr
    assert str(work / "recipe.yaml") in done.stdout


@pytest.fixture(scope="module")
def slurm(hosts) -> Iterator[dict[str, str]]:
    if missing := what_slurm_lacks():
        pytest.skip(missing)
    with slurm_on(hosts[:2]) as environment:
        yield {**environment, "OMP_NUM_THREADS": "1"}


def test_inside_an_allocation_of_slurm(hosts, work, one_host, slurm):
    """The hosts are those that Slurm gave out, srun starts the ranks, and they meet by Slurm's variables."""
    launch = [*LAUNCH[:5], "--hosts", "slurm", "--launcher", "slurm", "output=slurm"]
    words = ["salloc", "-Q", "-N2", "--ntasks-per-node=1", *launch]
    done = hosts[0].run(words, cwd=work, env=slurm, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(work / "slurm") == one_host
    assert ranks_left(hosts) == []


def test_a_script_for_sbatch(hosts, work, one_host, slurm):
    """As `--via srun --dry-run` prints it; CPUs, so no GPUs are asked for."""
    words = [*LAUNCH[:5], "--via", "srun", "--nodes", "2", "--devices", "1", "--dry-run", "output=sbatch"]
    script = hosts[0].run(words, cwd=work, env={**slurm, "DS_ACCELERATOR": "cpu"})
    (work / "job.sh").write_text(script.stdout)
    done = hosts[0].run(["sbatch", "--wait", "job.sh"], cwd=work, env=slurm, timeout=400)
    said = "\n".join(path.read_text() for path in work.glob("*.log"))
    assert done.returncode == 0, script.stderr + done.stdout + done.stderr + said
    assert losses(work / "sbatch") == one_host
