"""Runs as they are now, read from their files alone: while they train, after a crash, from any host that sees them."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any

from ...data_prep.errors import UserError
from ..metrics.reading import counting, read_lines
from ..sinks.jsonl import METRICS
from .collect import collect
from .page import MOST_RUNS, points_of

SILENT = 120.0  # seconds without a record, at least, before a run counts as silent …
_LONGEST = 5  # … and so many times the longest time between two records of late
_LATE = 200  # records
_SHARE = 10  # reading again waits so many times as long as reading took


def runs_in(place: Path) -> list[Path]:
    """The run directory itself, or those in the folder, the newest few.

    Raises:
        UserError: there is none.
    """
    if (place / METRICS).exists():
        return [place]
    found = sorted(place.glob(f"*/{METRICS}"), key=_written, reverse=True)[:MOST_RUNS]
    if not found:
        raise UserError(f"{place}: neither a run directory nor a folder of some: there is no {METRICS} in it")
    return sorted(path.parent for path in found)


def state_of(records: list[dict[str, Any]], written: float, now: float) -> dict[str, str]:
    """How a run is, by the records that count.

    Args:
        written: when its record was last written to; now: both in seconds since 1970.
    """
    steps = [record for record in records if record["kind"] == "train"]
    step = steps[-1]["step"] if steps else records[-1]["step"] if records else 0
    total = next((record["total_steps"] for record in reversed(records) if "total_steps" in record), None)
    at = f"step {step:,}" + (f" of {total:,}" if total else "")
    if total and step >= total:
        return {"kind": "finished", "said": f"finished, {at}"}
    if records and records[-1].get("event") == "failed":
        return {"kind": "failed", "said": f"failed at {at}: {records[-1].get('error', '')}"[:300]}
    late = [record for record in records[-_LATE:] if "time" in record]
    gaps = [later["time"] - earlier["time"] for earlier, later in pairwise(late) if earlier["run"] == later["run"]]
    if now - written <= max(SILENT, _LONGEST * max(gaps, default=0.0)):
        return {"kind": "training", "said": f"training, {at}"}
    since = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(written))
    return {"kind": "silent", "said": f"no word since {since}: stopped, or hanging, at {at}"}


@dataclass
class LiveRuns:
    """What the page shows, made anew when a file has changed or a run has fallen silent, for all who look on."""

    place: Path
    _lock: Lock = field(default_factory=Lock)
    _known: dict[Path, tuple[Any, dict[str, Any]]] = field(default_factory=dict)
    _text: str = "[]"
    _again: float = 0.0  # by time.monotonic

    def text(self) -> str:
        """The runs, as JSON in one line."""
        with self._lock:
            begun = time.monotonic()
            if begun >= self._again:
                self._text = json.dumps(self.runs(), ensure_ascii=True, allow_nan=False)
                now = time.monotonic()
                self._again = now + _SHARE * (now - begun)
            return self._text

    def runs(self) -> list[dict[str, Any]]:
        """Those that can be read; of one that cannot, nothing but why."""
        places = runs_in(self.place)
        found = []
        for run in places:
            file = run / METRICS
            mark = (_written(file), file.stat().st_size, len(places))
            if run not in self._known or self._known[run][0] != mark:
                self._known[run] = (mark, _collected(run, points_of(len(places))))
            shown = dict(self._known[run][1])
            shown["state"] = shown.get("state") or state_of(shown.pop("records"), mark[0], time.time())
            shown.pop("records", None)
            found.append(shown)
        return found


def _collected(run: Path, points: int) -> dict[str, Any]:
    try:
        lines = list(read_lines(run))
        return {**collect(run, points, lines), "records": _tail(counting(lines))}
    except UserError as error:
        empty = {
            "figures": [],
            "marks": {},
            "facts": [],
            "tasks": [],
            "answers": [],
            "recipe": {},
            "deepspeed": {},
            "environment": {},
        }
        clock = {"step": [0], "tokens": [0], "hours": [0]}
        state = {"kind": "failed", "said": str(error)}
        return {"name": run.name, "path": str(run), "clock": clock, **empty, "state": state}


def _tail(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `state_of` looks at."""
    started = [record for record in records[:-_LATE] if "total_steps" in record]
    return [*started[-1:], *records[-_LATE:]]


def _written(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
