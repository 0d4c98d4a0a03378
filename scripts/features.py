"""Tries DeepSpeed's own levers, and writes tests/distributed/features.json and docs/deepspeed_features.md."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import astuple
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TRANSFORMERS_VERBOSITY="error", PYTHONWARNINGS="ignore")

from tests.distributed import feature_trials  # noqa: E402

TABLE = ROOT / "tests" / "distributed" / "features.json"
PAGE = ROOT / "docs" / "deepspeed_features.md"


def main() -> int:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for row in feature_trials.trials(Path(folder)):
            found.append(row)
            print(f"{row.outcome:8} {row.name}: {row.detail}", flush=True)
    TABLE.write_text("[\n" + ",\n".join(" " + json.dumps(astuple(row)) for row in found) + "\n]\n", encoding="utf-8")
    versions = ", ".join(f"{name} {version(name)}" for name in ("deepspeed", "torch", "transformers"))
    PAGE.write_text(feature_trials.page(found, versions), encoding="utf-8")
    return 0 if all(row.outcome in ("works", "raises") for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
