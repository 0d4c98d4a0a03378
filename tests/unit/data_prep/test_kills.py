"""SIGKILL at random instants, of the parent and of its workers: the store comes out as if nothing had happened."""

from __future__ import annotations

import filecmp
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.unit.data_prep.samples import stdlib_texts, write_jsonl
from zeropipe.data_prep.store import TokenStore


def command(corpus: Path, tokenizer: Path, output: Path) -> list[str]:
    options = ["--shuffle", "3", "--task-size", "50000", "--shard-size", "300000", "--workers", "2", "--quiet"]
    start = [sys.executable, "-m", "zeropipe.data_prep.cli", "prepare"]
    return [*start, "--input", str(corpus), "--tokenizer", str(tokenizer), "--output", str(output), *options]


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """The processes that the fork server of a preparation started."""
    return [child for child in process.children(recursive=True) if child.parent() != process]


def run_with_a_kill(arguments: list[str], after: float, victim: str) -> bool:
    """Starts a preparation and kills it, or one of its workers, after some seconds. False if it was faster."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + after
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    if process.poll() is not None:
        return False
    family = psutil.Process(process.pid).children(recursive=True)
    workers = workers_of(psutil.Process(process.pid))
    target = workers[0] if victim == "worker" and workers else process
    target.kill()
    process.wait(60)
    _, left = psutil.wait_procs(family, timeout=20)
    assert not left, f"processes left behind: {left}"
    return True


def disturb(folder: Path, tokenizer: Path, kills: int) -> None:
    """Prepares the same store again and again until `kills` kills have hit a running preparation."""
    corpus = write_jsonl(folder / "corpus.jsonl", stdlib_texts(60))
    start = time.monotonic()
    subprocess.run(command(corpus, tokenizer, folder / "quiet"), check=True, stdout=subprocess.DEVNULL, timeout=120)
    duration = time.monotonic() - start
    chance = random.Random(kills)
    stores, hits = [folder / "disturbed0"], 0
    while hits < kills:
        after = duration * chance.uniform(0.05, 1.0)
        hit = run_with_a_kill(command(corpus, tokenizer, stores[-1]), after, chance.choice(["parent", "worker"]))
        hits += hit
        duration *= 1.05 if hit else 0.8  # machines change their pace: aim at what is still running
        if stores[-1].exists():  # whole, or not there at all
            assert TokenStore.open(stores[-1]).fingerprint == TokenStore.open(folder / "quiet").fingerprint
            stores.append(folder / f"disturbed{len(stores)}")
    subprocess.run(command(corpus, tokenizer, stores[-1]), check=True, stdout=subprocess.DEVNULL, timeout=120)
    names = [str(path.relative_to(folder / "quiet")) for path in (folder / "quiet").rglob("*") if path.is_file()]
    for store in stores:
        assert filecmp.cmpfiles(folder / "quiet", store, names, shallow=False) == (names, [], [])
    for left in folder.glob(".*"):  # of a preparation that was killed while cleaning up; the next one does it
        subprocess.run(command(corpus, tokenizer, folder / left.name[1:].removesuffix(".preparing")), timeout=120)
        assert not left.exists()


def test_a_few_kills(tmp_path: Path, tokenizer: Path) -> None:
    disturb(tmp_path, tokenizer, 6)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_kills(tmp_path: Path, tokenizer: Path) -> None:
    disturb(tmp_path, tokenizer, 200)


def test_a_worker_that_dies_is_reported_and_its_task_done_by_another(tmp_path: Path, tokenizer: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", stdlib_texts(60) * 4)
    arguments = command(corpus, tokenizer, tmp_path / "store")
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    parts = tmp_path / ".store.preparing/parts"
    while process.poll() is None and len(list(parts.glob("*.json"))) < 5:
        time.sleep(0.005)
    workers_of(psutil.Process(process.pid))[0].kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert re.search(r"a worker was killed by SIGKILL .* in task \d+ \(.*corpus\.jsonl\); the task is given to", errors)


def test_a_worker_that_always_dies_ends_the_job(tmp_path: Path, tokenizer: Path) -> None:
    """Each worker that is started is killed at once: after three the job gives up, with a reason."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", stdlib_texts(60))
    arguments = [*command(corpus, tokenizer, tmp_path / "store"), "--workers", "1"]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        for worker in workers_of(psutil.Process(process.pid)):
            worker.send_signal(signal.SIGKILL)
        time.sleep(0.01)
    assert process.returncode == 2
    assert process.stderr is not None
    error = process.stderr.read().splitlines()[-1]
    assert re.match(r"error: a worker was killed by SIGKILL .* each of 3 times that it read .*corpus\.jsonl", error)
