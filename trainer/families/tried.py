"""What came of every family that was tried, by `scripts/families.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any


@lru_cache(maxsize=1)
def outcomes() -> Mapping[str, Any]:
    """By `model_type`: the number of steps, and for each kind of layout one of `works` (with its differences from one
    process), `refused`, `differs`, `fails` (with the reason) and `sensitive` (nothing can be told of small models).
    """
    return json.loads(Path(__file__).with_name("tried.json").read_text(encoding="utf-8"))


def columns_of(stage: int, tensor: int, pipeline: int, sequence: int, expert: int = 1) -> Iterator[str]:
    """The kinds of layout that one is made of."""
    yield f"ZeRO-{stage}"
    sizes = {"TP 2": tensor, "PP 2": pipeline, "SP 2": sequence, "EP 2": expert, "TP 2 x PP 2": min(tensor, pipeline)}
    yield from (column for column, size in sizes.items() if size > 1)
