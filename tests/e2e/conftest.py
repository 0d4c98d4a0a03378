"""Real material: a small instruct model, dialogues and preference pairs, got once and kept in a folder git ignores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.real import Material, prepared_store

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Material:
    folder, script = ROOT / "material", ROOT / "scripts" / "material.py"
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    stores = tmp_path_factory.mktemp("stores")
    made = {}
    for kind, source in (("sft", "dialogues"), ("dpo", "preferences")):
        for split in ("train", "valid"):
            records = folder / source / f"{split}.jsonl"
            made[f"{kind}-{split}"] = prepared_store(kind, records, folder / "smollm2", stores / f"{kind}-{split}")
    return Material(folder, made)
