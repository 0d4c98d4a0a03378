"""metrics.jsonl: every record as one line of JSON, floats unrounded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, TextIO

from .base import SinkSettings

METRICS = "metrics.jsonl"


class JsonLines:
    """Appends; every line is flushed before `write` returns, and forced to disk with each event, so that a kill loses
    nothing and a record is on disk before a checkpoint of its step can be.
    """

    def __init__(self, settings: SinkSettings) -> None:
        settings.directory.mkdir(parents=True, exist_ok=True)
        self._file = open_for_append(settings.directory / METRICS)

    def write(self, record: Mapping[str, Any], message: str | None) -> None:
        # json writes floats with repr, which reads back bit for bit; one write per line, so lines never mix
        self._file.write(json.dumps(record) + "\n")
        if record["kind"] == "event":
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def open_for_append(path: Path) -> TextIO:
    """Opens metrics.jsonl line-buffered; a line that a kill cut short is taken off first."""
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(_end_of_last_line(file))
    return path.open("a", buffering=1)


def _end_of_last_line(file: IO[bytes], block: int = 1 << 16) -> int:
    """Offset behind the last newline: the file is read backwards, since it may be large."""
    position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - block)
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        position = start
    return 0
