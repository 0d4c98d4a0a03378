"""`mpirun` over two hosts: one leads the preparation, the other works, and the bytes are those of one process."""

import filecmp
import shutil
import sys
from pathlib import Path

import pytest

from tests.unit.data_prep.samples import stdlib_texts, write_jsonl
from zeropipe.data_prep.cli import main

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs an MPI, such as Debian's openmpi-bin"),
]
ETH0 = ["--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "eth0", "--mca", "oob_tcp_if_include", "eth0"]


def test_two_hosts_make_the_store_of_one(hosts, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", stdlib_texts(40))
    options = ["--input", str(corpus), "--train-tokenizer", "600", "--task-size", "100k", "--quiet"]
    assert main(["prepare", *options, "--output", str(tmp_path / "alone"), "--workers", "0"]) == 0
    mpirun = ["mpirun", "--allow-run-as-root", "-n", "2", "--host", "node1,node2", *ETH0]
    program = [sys.executable, "-m", "zeropipe.data_prep.cli", "prepare", *options, "--mpi"]
    names = [str(path.relative_to(tmp_path / "alone")) for path in (tmp_path / "alone").rglob("*.*")]
    where = hosts[0].run([*mpirun, "hostname"], cwd=tmp_path)
    assert sorted(where.stdout.split()) == ["node1", "node2"], where.stderr
    done = hosts[0].run([*mpirun, *program, "--output", str(tmp_path / "both")], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert filecmp.cmpfiles(tmp_path / "alone", tmp_path / "both", names, shallow=False) == (names, [], [])
