"""`zeropipe tune` on this machine: measured by real ranks, and what it writes trains."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import GPT2, NO_DROPOUT, tiny_json, tiny_recipe, tiny_store, write_pair

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]
ZEROPIPE = str(Path(sys.executable).parent / "zeropipe")


def zeropipe(folder: Path, *words: str) -> str:
    done = subprocess.run([ZEROPIPE, *words], cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_measures_the_first_and_hands_over_a_run(tmp_path):
    recipe = tiny_recipe(tiny_store(tmp_path / "store"), tmp_path / "run", model={"config": {**GPT2, **NO_DROPOUT}})
    write_pair(tmp_path, recipe, tiny_json("zero1"))
    words = ["tune", "recipe.yaml", "--deepspeed_config", "ds.json", "--devices", "2", "--measure", "1"]
    printed = zeropipe(tmp_path, *words, "--top", "2", "-o", "best.json")
    assert "2 x this machine" in printed
    first = next(line for line in printed.splitlines() if line.startswith("  1 "))
    assert float(first.split()[-1]) > 0
    best = json.loads((tmp_path / "best.json").read_text())
    launch = shlex.split(printed.split("to run it\n")[1])
    assert launch[:2] == ["zeropipe", "launch"]
    zeropipe(tmp_path, *launch[1:], "duration.steps=2")
    used = json.loads((tmp_path / "run" / "deepspeed.json").read_text())
    assert used["zero_optimization"]["stage"] == best["zero_optimization"]["stage"]
    assert used["train_micro_batch_size_per_gpu"] == best["train_micro_batch_size_per_gpu"]
