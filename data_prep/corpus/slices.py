"""Where documents come from: slices of files, and what to say of one that is no document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import UserError

_BUFFER = 1 << 20


@dataclass(frozen=True)
class Slice:
    """A part of one file: bytes [start, stop) of plain text, row groups [start, stop) of parquet, or the whole file."""

    path: str
    format: str  # jsonl | text | lines | paragraphs | parquet | arrow
    compression: str | None = None
    start: int = 0
    stop: int | None = None
    cost: int = 0  # bytes on disk, for progress and balance


class BadDocument(UserError):
    """A piece of input that is not a document: where it is and why."""

    def __init__(self, path: str, reason: str, *, offset: int | None = None, line: int | None = None) -> None:
        super().__init__(path, reason)
        self.path, self.reason, self.offset, self.line = path, reason, offset, line

    def __str__(self) -> str:
        return f"{self.describe()}; --on-error skip passes over such documents"

    def describe(self) -> str:
        """Where it is, with the line where that can be told, and why."""
        line = self.line
        if line is None and self.offset is not None:
            line = line_number(self.path, self.offset)
        where = self.path if line is None else f"{self.path}, line {line}"
        return f"{where}: {self.reason}"

    def __reduce__(self) -> Any:
        return _bad_document, (self.path, self.reason, self.offset, self.line)


def _bad_document(path: str, reason: str, offset: int | None, line: int | None) -> BadDocument:
    return BadDocument(path, reason, offset=offset, line=line)


class Spot(NamedTuple):
    """Where a record begins: its line, its offset in a file read from the middle, or its row."""

    path: str
    line: int | None = None
    offset: int | None = None
    row: int | None = None

    def bad(self, reason: str) -> BadDocument:
        """What to say of a record there that is none."""
        reason = reason if self.row is None else f"row {self.row}: {reason}"
        return BadDocument(self.path, reason, offset=self.offset, line=self.line)


def line_number(path: str, offset: int) -> int:
    """Number, from 1, of the line that begins at byte `offset` of a plain file. Reads all before it."""
    lines, left = 1, offset
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(_BUFFER, left))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines
