"""Parts to shards: drops duplicates, cuts at the limit, shuffles, and writes the documents in their final order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .tasks import META, Record, part_files
from .writer import ShardWriter

BLOCK_TOKENS = 4 << 20  # tokens gathered at a time by a shuffle


@dataclass(frozen=True)
class Assembly:
    deduplicate: bool = False
    limit_documents: int | None = None
    shuffle: int | None = None  # the seed


@dataclass
class Totals:
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    duplicates: int = 0
    beyond_limit: int = 0


class Part:
    """What one task left, memory-mapped, and which of its documents are kept."""

    def __init__(self, parts: Path, record: Record, dtype: np.dtype) -> None:
        files = part_files(parts, record.number)
        self.tokens = np.memmap(files["bin"], dtype, "r") if record.tokens else np.empty(0, dtype)
        self.meta = np.memmap(files["meta"], META, "r") if record.documents else np.empty(0, META)
        self.keep = np.ones(record.documents, bool)

    @property
    def lengths(self) -> np.ndarray:
        return np.ascontiguousarray(self.meta["tokens"])


def assemble(directory: Path, records: list[Record], plan: Assembly, writer: ShardWriter) -> Totals:
    """Writes the documents of all parts. The result depends on the parts and the plan alone."""
    totals = Totals()
    parts = [Part(directory, record, writer.dtype) for record in records]
    if plan.deduplicate:
        totals.duplicates = _drop_duplicates(parts)
    if plan.limit_documents is not None:
        totals.beyond_limit = _drop_beyond(parts, plan.limit_documents)
    for part in parts:
        totals.documents += int(part.keep.sum())
        totals.tokens += int(part.meta["tokens"].sum(dtype=np.int64, where=part.keep))
        totals.text_bytes += int(part.meta["bytes"].sum(where=part.keep))
    for tokens, lengths in _in_order(parts) if plan.shuffle is None else _shuffled(parts, plan.shuffle):
        writer.append(tokens, lengths)
    return totals


def _drop_duplicates(parts: list[Part]) -> int:
    """Keeps the first of the documents with the same 128-bit digest of their text."""
    digests = np.concatenate([part.meta["digest"] for part in parts])
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal digests stay in corpus order
    ordered = digests[order]
    repeated = np.zeros(len(order), bool)
    repeated[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    start = 0
    for part in parts:
        stop = start + len(part.keep)
        part.keep &= ~repeated[start:stop]
        start = stop
    return int(repeated.sum())


def _drop_beyond(parts: list[Part], limit: int) -> int:
    dropped = 0
    for part in parts:
        beyond = np.flatnonzero(part.keep)[max(0, limit) :]
        part.keep[beyond] = False
        dropped += len(beyond)
        limit -= int(part.keep.sum())
    return dropped


def _in_order(parts: list[Part]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for part in parts:
        lengths = part.lengths
        if part.keep.all():
            yield part.tokens, lengths
        else:
            yield part.tokens[np.repeat(part.keep, lengths)], lengths[part.keep]


def _shuffled(parts: list[Part], seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The kept documents in the order of a hash of (seed, place in the corpus)."""
    which = np.concatenate([np.full(int(part.keep.sum()), number, np.int32) for number, part in enumerate(parts)])
    lengths = np.concatenate([part.lengths[part.keep] for part in parts])
    starts = np.concatenate([(np.cumsum(part.lengths, dtype=np.int64) - part.lengths)[part.keep] for part in parts])
    order = np.argsort(splitmix(np.arange(len(which), dtype=np.uint64), seed), kind="stable")
    ends = np.cumsum(lengths[order], dtype=np.int64)
    first = 0
    while first < len(order):
        base = int(ends[first - 1]) if first else 0
        stop = max(first + 1, int(np.searchsorted(ends, base + BLOCK_TOKENS, side="right")))
        block = np.empty(int(ends[stop - 1]) - base, parts[0].tokens.dtype)
        position = 0
        for document in order[first:stop].tolist():
            start, length = starts[document], lengths[document]
            block[position : position + length] = parts[which[document]].tokens[start : start + length]
            position += length
        yield block, lengths[order[first:stop]]
        first = stop


def splitmix(numbers: np.ndarray, seed: int) -> np.ndarray:
    """SplitMix64 of `numbers + seed * golden ratio`, uint64: fixed by its definition, whatever NumPy's version."""
    with np.errstate(over="ignore"):
        x = numbers + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
