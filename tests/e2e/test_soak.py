"""Many short launches end as they should: what shows in one of fifty shows here.

python -m pytest -m slow tests/e2e/test_soak.py        SOAK=300 for as many launches; 60 if it is not set
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.tiny import GPT2, LLAMA, NO_DROPOUT, tiny_json, tiny_recipe, tiny_store, write_pair

LAUNCHES = int(os.environ.get("SOAK", "60"))
SECONDS = 600  # that one launch may take on a machine that does other things as well
CASES = [
    ({**GPT2, **NO_DROPOUT}, "zero3", {}),
    (LLAMA, "zero3", {}),
    (LLAMA, "zero2", {"sequence_parallel_size": 2}),
]
BUSY = "while True: sum(range(10**6))"


@pytest.mark.slow
@pytest.mark.timeout(SECONDS * LAUNCHES)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_every_short_launch_ends_with_0(tmp_path, busy):
    """Half of them with more to do for every core of the machine than it can."""
    store = tiny_store(tmp_path / "store")
    endings: Counter[int] = Counter()
    said: list[str] = []
    with burners((os.cpu_count() or 1) * 2 if busy else 0):
        for number in range(LAUNCHES // 2):
            model, zero, extra = CASES[number % len(CASES)]
            folder = tmp_path / str(number)
            folder.mkdir()
            sections = {"model": {"config": model}, "duration": {"steps": 4}, "save": {"every": 2}}
            done = _launch(folder, tiny_recipe(store, folder / "run", **sections), tiny_json(zero, **extra))
            endings[done.returncode] += 1
            said += [done.stderr] if done.returncode else []
            print(f"{number + 1} of {LAUNCHES // 2}: {dict(endings)}", flush=True)
    assert endings == {0: LAUNCHES // 2}, said


@contextmanager
def burners(count: int) -> Iterator[None]:
    """So many processes that do nothing but take the processor."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _launch(folder: Path, recipe: dict, ds: dict) -> subprocess.CompletedProcess[str]:
    recipe_file, ds_file = write_pair(folder, recipe, ds)
    words = ["launch", str(recipe_file), "--deepspeed_config", str(ds_file), "--devices", "2"]
    return subprocess.run(
        [sys.executable, "-m", "zeropipe.launcher", *words],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
