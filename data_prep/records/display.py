"""Records shown: their texts with what is learnt in them lit up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..manifest import RecordsInfo
from ..store import BEGINS, TRAINED, TokenStore

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LIGHT = ("\033[30;42m", "\033[0m")  # black on green
BRACKETS = ("⟦", "⟧")
LABELS = {"sft": ("",), "dpo": ("chosen", "rejected")}


def describe_records(records: RecordsInfo, tokenizer: Tokenizer | None) -> list[str]:
    """A few lines about the records of a store as a whole."""
    stops = ", ".join(
        f"{tokenizer.id_to_token(number)!r} ({number})" if tokenizer else str(number) for number in records.stop_ids
    )
    settings = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in records.settings.items())
    kind = {"sft": "sft: one text a record", "dpo": "dpo: the chosen and the rejected text of a pair"}[records.kind]
    return [
        f"records of {kind}; the longest has {records.longest:,} tokens",
        f"stop tokens that are learnt: {stops or 'none'}",
        f"made with {settings}",
    ]


def show_record(
    store: TokenStore, number: int, limit: int, tokenizer: Tokenizer | None, marks: tuple[str, str]
) -> Iterator[str]:
    """The lines of a record: each text with its label, `limit` tokens of it at most, the learnt ones between marks."""
    assert store.records is not None
    start, stop = store.document_start(number), store.document_start(number + 1)
    ids, flags = store.read(start, stop), store.flags(start, stop)
    begins = np.flatnonzero(flags & BEGINS)
    labels = LABELS[store.records.kind]
    for text, (own, learnt) in enumerate(
        zip(np.split(ids, begins[1:]), np.split(flags & TRAINED != 0, begins[1:]), strict=True)
    ):
        label = f"{labels[text]}: " if text < len(labels) and labels[text] else ""
        cut = f", the first {limit}" if len(own) > limit else ""
        yield f"{label}{len(own):,} tokens, {int(learnt.sum()):,} learnt{cut}"
        yield highlighted(own[:limit], learnt[:limit], tokenizer, marks)


def highlighted(ids: np.ndarray, learnt: np.ndarray, tokenizer: Tokenizer | None, marks: tuple[str, str]) -> str:
    """Tokens as text, or as ids without a tokenizer, with runs of learnt ones between the marks."""
    edges = np.flatnonzero(np.diff(learnt)) + 1
    pieces = []
    for own, lit in zip(np.split(ids, edges), np.split(learnt, edges), strict=True):
        numbers = own.tolist()
        text = tokenizer.decode(numbers, skip_special_tokens=False) if tokenizer else " ".join(map(str, numbers)) + " "
        pieces.append(f"{marks[0]}{text}{marks[1]}" if len(lit) and lit[0] else text)
    return "".join(pieces)
