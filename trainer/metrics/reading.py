"""Reading the record of a run back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from ...data_prep.errors import UserError
from ..sinks.jsonl import METRICS

SOURCE = "source/"  # in a step's record: source/NAME/loss and source/NAME/tokens of each source of a mixture
REWIND = "rewind"  # the event of a run that goes back; what follows has an id of its own, as after a resume


def read_lines(run_directory: str | Path) -> Iterator[dict[str, Any]]:
    """Every record of metrics.jsonl as it was written, those of dead runs too; a line cut short at the end is skipped.

    Raises:
        UserError: there is no metrics.jsonl, or a line inside it is not JSON.
    """
    path = Path(run_directory) / METRICS
    try:
        file = path.open()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected the record of a run here") from error
    with file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                yield _parsed(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON, the file is damaged ({error})") from error


def _parsed(line: str) -> Any:
    try:
        return orjson.loads(line)  # several times as fast; both read floats back bit for bit
    except ValueError:
        return json.loads(line)  # which also takes NaN and Infinity


def read_metrics(run_directory: str | Path) -> list[dict[str, Any]]:
    """The records that count, in order: for each step those of the last process group that took it.

    Where a run was resumed from step S, what earlier process groups recorded beyond S is left out, as are all earlier
    records where it was started afresh.
    """
    return counting(read_lines(run_directory))


def counting(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of all lines of a record, those that count."""
    kept: list[dict[str, Any]] = []
    run = None
    for record in lines:
        if record["run"] != run:
            run = record["run"]
            base = resumed_from(record)
            fresh = record.get("event") == "start"
            kept = [] if fresh else [earlier for earlier in kept if earlier["step"] <= base]
        kept.append(record)
    return kept


def resumed_from(first: Mapping[str, Any]) -> int:
    """The step before a process group's first record: an event names the step it starts from, a step comes after."""
    return first["step"] - (first["kind"] == "train")


def begun_as(run_directory: str | Path) -> str | None:
    """The id of the process group that last began the run afresh, or was the first to go on with it here.

    Raises:
        UserError: the record is damaged.
    """
    if not (Path(run_directory) / METRICS).exists():
        return None
    found = None
    for record in read_lines(run_directory):
        if found is None or record.get("event") == "start":
            found = record["run"]
    return found


def skipped_samples(run_directory: str | Path) -> list[tuple[int, int]]:
    """Ranges of samples that any process group of this run left out, or went back to leave out, since it was started
    afresh; none without a record.

    Raises:
        UserError: the record is damaged.
    """
    if not (Path(run_directory) / METRICS).exists():
        return []
    found: list[tuple[int, int]] = []
    for record in read_lines(run_directory):
        if record.get("event") == "start":
            found = []
        elif record.get("event") in ("skip", REWIND):
            found.append((record["samples"][0], record["samples"][1]))
    return found
