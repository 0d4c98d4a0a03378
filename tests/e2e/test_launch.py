"""`zeropipe launch` on this machine, with real ranks: killed, and finished by the same command.

That SIGTERM to it saves on all hosts is tried in tests/hosts/test_training.py.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.tiny import tiny_recipe, tiny_store

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
ZEROPIPE = str(Path(sys.executable).parent / "zeropipe")
ENOUGH = 1_000_000  # steps: more than any test waits for


def start(folder: Path, steps: int) -> subprocess.Popen[str]:
    words = ["launch", "recipe.yaml", "--deepspeed_config", "ds.json", "--devices", "2", f"duration.steps={steps}"]
    return subprocess.Popen([ZEROPIPE, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def events(folder: Path) -> list[dict]:
    metrics = folder / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def wait_for(process: subprocess.Popen[str], condition, what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no {what} within {seconds:.0f} s"
        time.sleep(0.1)


def ranks(folder: Path) -> list[psutil.Process]:
    """Trainers of this test that run, by the folder they run in."""
    found = []
    for process in psutil.process_iter():
        try:
            if "zeropipe.trainer" in process.cmdline() and Path(process.cwd()) == folder:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_kill_and_finish(tmp_path):
    tiny_store(tmp_path / "store")
    recipe = tiny_recipe(tmp_path / "store", tmp_path / "run", save={"every": 5, "keep": 2}, log={"every": 1})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "ds.json").write_text(
        json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}})
    )
    shared_memory = set(os.listdir("/dev/shm"))

    # SIGKILL to one rank: the launch ends, says so, and takes the other rank with it
    process = start(tmp_path, ENOUGH)
    wait_for(process, lambda: any(e["kind"] == "train" and e["step"] > 6 for e in events(tmp_path)), "seventh step")
    ranks(tmp_path)[-1].kill()
    output = process.communicate(timeout=90)[0]
    assert process.returncode == 3, output
    assert re.search(r"error: rank \d on \S+ was ended by SIGKILL", output)
    assert ranks(tmp_path) == []
    killed_at = max(e["step"] for e in events(tmp_path))

    # the same command resumes, and finishes
    process = start(tmp_path, killed_at + 5)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    (resume,) = [e for e in events(tmp_path) if e.get("event") == "resume"]
    assert killed_at - 10 <= resume["step"] <= killed_at and resume["step"] % 5 == 0
    assert events(tmp_path)[-1]["step"] == killed_at + 5
    assert set(os.listdir("/dev/shm")) == shared_memory
