"""`mpirun -n 2 zeropipe prepare --mpi`: the same bytes as one process."""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.data_prep.samples import stdlib_texts, write_jsonl
from zeropipe.data_prep.cli import main

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs an MPI, such as Debian's openmpi-bin"),
]


def mpirun(ranks: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(ranks)]
    program = [sys.executable, "-m", "zeropipe.data_prep.cli", *arguments]
    # Open MPI 4 sometimes stumbles over its own messages about a failed rank, and then exits with 1
    environment = {**os.environ, "OMPI_MCA_orte_base_help_aggregate": "0"}
    return subprocess.run([*command, *program], capture_output=True, text=True, timeout=120, env=environment)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", stdlib_texts(40))


def prepare(corpus: Path, output: Path) -> list[str]:
    options = ["--input", str(corpus), "--train-tokenizer", "600", "--task-size", "100k", "--quiet"]
    return ["prepare", *options, "--output", str(output)]


def test_the_ranks_of_mpi_make_the_same_store(tmp_path: Path, corpus: Path) -> None:
    assert main([*prepare(corpus, tmp_path / "alone"), "--workers", "0"]) == 0
    for ranks in (2, 3):
        run = mpirun(ranks, [*prepare(corpus, tmp_path / f"mpi{ranks}"), "--mpi"])
        assert run.returncode == 0, run.stderr
        names = [str(path.relative_to(tmp_path / "alone")) for path in (tmp_path / "alone").rglob("*.*")]
        compared = filecmp.cmpfiles(tmp_path / "alone", tmp_path / f"mpi{ranks}", names, shallow=False)
        assert compared == (names, [], [])


def test_an_error_ends_all_ranks(tmp_path: Path, corpus: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(corpus.read_text() + '{"title": 1}\n')
    run = mpirun(2, [*prepare(bad, tmp_path / "store"), "--on-error", "skip", "--mpi"])
    assert run.returncode == 0, run.stderr
    run = mpirun(2, [*prepare(bad, tmp_path / "other"), "--mpi"])
    assert run.returncode == 2, run.stderr
    assert "no text at the key 'text'; the keys there are: 'title'" in run.stderr
    assert "Traceback" not in run.stderr and not (tmp_path / "other").exists()
