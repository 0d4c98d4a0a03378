"""Tries every small combination of ZeRO, precision, offload and parallelism; writes the table that tests hold plans to.

usage: legality.py [WORD …]: with words, only combinations whose description holds one of them, merged into the table;
`plain` tries what plain DeepSpeed does beside them.
Writes tests/distributed/legality.json and docs/legality.md. About ten minutes on two idle cores.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TRANSFORMERS_VERBOSITY="error", PYTHONWARNINGS="ignore")

from scripts.legality_page import page  # noqa: E402
from tests.distributed import deepspeed_trials, legality_trials  # noqa: E402
from tests.distributed.legality_table import TABLE, Combination, Table, Trial  # noqa: E402

PAGE = ROOT / "docs" / "legality.md"


def main(words: Sequence[str]) -> int:
    known, old = legality_trials.truths(), Table.read() if words else None
    found: dict[Combination, Trial] = dict(old.trials) if old else {}
    plain = list(old.plain) if old else []
    for split in legality_trials.splits():
        chosen = [c for c in legality_trials.combinations(split) if not words or any(word in str(c) for word in words)]
        for trial in legality_trials.try_all(chosen, known):
            found[trial.combination] = trial
            print(f"{trial.outcome:8} {trial.combination}: {trial.detail}", flush=True)
    if not words or "plain" in words:
        plain = list(deepspeed_trials.deepspeed_trials(known))
    versions = {name: version(name) for name in ("deepspeed", "torch", "transformers")}
    table = Table(versions, legality_trials.BOUNDS, in_order(found), plain)
    table.write()
    PAGE.write_text(page(table), encoding="utf-8")
    print(f"{TABLE.name}, {PAGE.relative_to(ROOT)}: {len(found)} combinations, {len(plain)} more")
    return 0


def in_order(found: dict[Combination, Trial]) -> dict[Combination, Trial]:
    every = [c for split in legality_trials.splits() for c in legality_trials.combinations(split)]
    return {c: found[c] for c in every if c in found}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
