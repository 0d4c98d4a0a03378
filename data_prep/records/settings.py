"""What the user asks of records, and what of it a worker needs to know."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KINDS = ("sft", "dpo")
TRAIN_ON = ("assistant", "last_assistant", "all")
EXCESS = ("drop", "truncate", "error")


class BadRecord(Exception):
    """A record that cannot be learnt from: why. Whoever knows its place adds it."""


@dataclass(frozen=True)
class RecordOptions:
    """Decides, with the input and the tokenizer, the bytes of a store of records."""

    kind: str  # sft | dpo | auto: as the first record is
    chat_template: Path | None = None  # instead of the tokenizer's
    train_on: str = "assistant"
    train_trailing: bool = False  # also what the template writes after the token that ends an answer
    seq_len: int | None = None  # tokens of a record, all its texts together
    excess: str = "drop"  # what becomes of longer ones
    date: str | None = None  # YYYY-MM-DD, for templates that write today's

    def content(self) -> dict[str, Any]:
        """As JSON."""
        path = self.chat_template
        return asdict(self) | {"chat_template": None if path is None else str(path)}


@dataclass(frozen=True)
class RecordJob:
    """`RecordOptions` with nothing left open; the template lies in the job's tokenizer folder."""

    kind: str
    train_on: str
    train_trailing: bool
    seq_len: int | None
    excess: str
    date: str | None  # what a template is told that asks for it
    stops: tuple[int, ...]  # ids at which generation stops
