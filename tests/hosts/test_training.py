"""Two real hosts train what two ranks on one host train, bit for bit; and stop together when they are asked to."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from .conftest import BIN, STEPS, losses, ranks_left, wait_for_steps
from .test_prepare_mpi import ETH0

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(600)]


def test_deepspeed_over_pdsh(hosts, work, one_host):
    """The command of the README, without `zeropipe launch`; with two networks it must be told which."""
    words = [str(BIN / "deepspeed"), "--hostfile", "hostfile", "--master_addr", hosts[0].address]
    words += ["--module", "zeropipe.trainer", "--run", "recipe.yaml"]
    done = hosts[0].run([*words, "--deepspeed_config", "zero2", "output=plain"], cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(work / "plain") == one_host


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [("zero3", ["--deepspeed_config", "zero3"]), ("pipeline", ["--deepspeed_config", "zero1", "parallel.pipeline=2"])],
)
def test_two_hosts_compute_what_one_does(hosts, work, name, words):
    """No environment set by hand, no address, no port: the hosts are as the fixture says."""
    command = [str(BIN / "zeropipe"), "launch", "recipe.yaml", *words]
    for where, run in ((["--devices", "2"], f"{name}-one"), (["--hostfile", "hostfile"], f"{name}-two")):
        done = hosts[0].run([*command, *where, f"output={run}"], cwd=work, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(work / f"{name}-two")) == STEPS
    assert losses(work / f"{name}-two") == losses(work / f"{name}-one")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs an MPI, such as Debian's openmpi-bin")
def test_mpirun(hosts, work, one_host):
    """Nobody says where to meet: the ranks try rank 0's addresses, of which one leads nowhere."""
    words = ["mpirun", "--allow-run-as-root", "-n", "2", "--host", "node1,node2", *ETH0]
    words += ["-x", "DS_ACCELERATOR=cpu", "-x", "OMP_NUM_THREADS=1", sys.executable, "-m", "zeropipe.trainer"]
    done = hosts[0].run([*words, "recipe.yaml", "--deepspeed_config", "zero2", "output=mpi"], cwd=work, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(work / "mpi") == one_host


def test_torchrun_on_every_host(hosts, work, one_host):
    """Ranks need torchrun's variables alone; MASTER_ADDR may be a name that means the loopback on its own host."""
    words = [str(BIN / "torchrun"), "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "node1"]
    rank = ["-m", "zeropipe.trainer", "recipe.yaml", "--deepspeed_config", "zero2", "output=torchrun"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    commands = [host.command([*words, "--node-rank", str(i), *rank]) for i, host in enumerate(hosts[:2])]
    nodes = [
        subprocess.Popen(command, cwd=work, env=environment, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    try:
        said = [node.communicate(timeout=120)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    assert losses(work / "torchrun") == one_host


def test_launch_on_a_hostfile_and_stop(hosts, work, one_host):
    """SIGTERM to the launcher here reaches the ranks on both hosts: they save, and nothing is left of them."""
    shared_memory = set(os.listdir("/dev/shm"))
    words = [str(BIN / "zeropipe"), "launch", "recipe.yaml", "--deepspeed_config", "zero2", "--hostfile", "hostfile"]
    process = subprocess.Popen(
        hosts[0].command([*words, "output=two", "duration.steps=1000000"]),
        cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        wait_for_steps(work / "two" / "metrics.jsonl", process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 4, output
    assert losses(work / "two")[:STEPS] == one_host
    (checkpoint,) = (work / "two" / "checkpoints").glob("step-*")
    assert int(checkpoint.name.removeprefix("step-")) == len(losses(work / "two"))
    assert ranks_left(hosts) == []
    assert not list((work / "two").glob(".launch-*"))
    assert set(os.listdir("/dev/shm")) == shared_memory
