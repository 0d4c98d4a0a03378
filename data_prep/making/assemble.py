"""Parts to shards: drops duplicates, cuts at the limit, shuffles, and writes the documents in their final order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..index import runs
from ..writer import ShardWriter
from .shuffle import shuffled
from .tasks import META, TaskRecord, part_files

_BLOCK_TOKENS = 4 << 20
DIGESTS = 4 << 20  # documents compared at a time when duplicates are sought


@dataclass(frozen=True)
class Assembly:
    """What is done to the documents between the parts and the shards."""

    deduplicate: bool = False
    limit_documents: int | None = None
    shuffle: int | None = None  # the seed


@dataclass
class Totals:
    """What an assembly kept, and how many documents it left out."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    longest: int = 0  # tokens of one document
    duplicates: int = 0
    beyond_limit: int = 0


class Assembler:
    """Takes the parts as they are finished, in any order, and writes the shards.

    What is written depends on the parts and the plan alone. A plan that neither drops duplicates nor shuffles is
    carried out while other parts are still being made.
    """

    def __init__(self, directory: Path, plan: Assembly, writer: ShardWriter, first: int = 0) -> None:
        self.directory = directory
        self.plan = plan
        self.writer = writer
        self.totals = Totals()
        self.records: list[TaskRecord] = []  # of the parts taken, in order
        self._early: dict[int, TaskRecord] = {}
        self._next = first
        self._keep: list[np.ndarray] = []  # documents to keep, one array per part; only if the plan must see all first
        self._wait = plan.deduplicate or plan.shuffle is not None

    @property
    def enough(self) -> bool:
        """Whether the limit is reached, so that no further part is needed."""
        limit = self.plan.limit_documents
        return limit is not None and not self.plan.deduplicate and self.totals.documents >= limit

    def add(self, record: TaskRecord) -> None:
        """Takes a finished part, in any order; writes what its turn has come for."""
        self._early[record.number] = record
        while not self.enough and (ready := self._early.pop(self._next, None)):
            self._next += 1
            self.records.append(ready)
            keep = np.ones(ready.documents, bool)
            if not self.plan.deduplicate:
                self._count(ready, keep)
            if self._wait:
                self._keep.append(keep)
            else:
                self._write_part(ready, keep)

    def finish(self) -> Totals:
        """Does what needs all the parts, and writes the rest."""
        if self.plan.deduplicate:
            self._drop_duplicates()
            for record, keep in zip(self.records, self._keep, strict=True):
                self._count(record, keep)
        if self.plan.shuffle is not None:
            for tokens, lengths in self._shuffled(self.plan.shuffle):
                self.writer.append(tokens, lengths)
        elif self._wait:
            for record, keep in zip(self.records, self._keep, strict=True):
                self._write_part(record, keep)
        return self.totals

    def _meta(self, record: TaskRecord) -> np.ndarray:
        return np.fromfile(part_files(self.directory, record.number)["meta"], META)

    def _count(self, record: TaskRecord, keep: np.ndarray) -> None:
        """Adds the kept documents of a part to the totals, after taking those beyond the limit out of `keep`."""
        if self.plan.limit_documents is not None:
            beyond = np.flatnonzero(keep)[max(0, self.plan.limit_documents - self.totals.documents) :]
            keep[beyond] = False
            self.totals.beyond_limit += len(beyond)
        meta = self._meta(record)
        self.totals.documents += int(keep.sum())
        self.totals.tokens += int(meta["tokens"].sum(dtype=np.int64, where=keep))
        self.totals.text_bytes += int(meta["bytes"].sum(where=keep))
        self.totals.longest = max(self.totals.longest, int(meta["tokens"].max(where=keep, initial=0)))

    def _write_part(self, record: TaskRecord, keep: np.ndarray) -> None:
        """Appends the kept documents of a part, block by block: a part may be a huge compressed file's."""
        lengths = self._meta(record)["tokens"]
        with part_files(self.directory, record.number)["bin"].open("rb") as file:
            for first, stop in runs(lengths, _BLOCK_TOKENS):
                own, kept = lengths[first:stop], keep[first:stop]
                tokens = np.fromfile(file, self.writer.dtype, int(own.sum(dtype=np.int64)))
                if not kept.all():
                    tokens, own = tokens[np.repeat(kept, own)], own[kept]
                self.writer.append(tokens, own)

    def _drop_duplicates(self) -> None:
        """Keeps the first of the documents with the same 128-bit digest of their text.

        In passes over ranges of the digest, so that memory does not grow with the corpus but for a byte a document.
        """
        documents = sum(map(len, self._keep))
        passes = -(-documents // DIGESTS)
        edges = [2**64 * i // passes for i in range(passes + 1)] if passes else []
        for low, high in pairwise(edges):
            found = [self._digests_between(record, low, high - 1) for record in self.records]
            digests = np.concatenate([digest for digest, _ in found])
            order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones stay in corpus order
            ordered = digests[order]
            repeated = np.zeros(len(order), bool)
            repeated[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
            self.totals.duplicates += int(repeated.sum())
            start = 0
            for keep, (_, places) in zip(self._keep, found, strict=True):
                keep[places[repeated[start : start + len(places)]]] = False
                start += len(places)

    def _digests_between(self, record: TaskRecord, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """Digests [n, 2] of a part whose first half is in [low, high], and the places of their documents [n]."""
        digests = self._meta(record)["digest"]
        places = np.flatnonzero((digests[:, 0] >= np.uint64(low)) & (digests[:, 0] <= np.uint64(high)))
        return digests[places], places

    def _shuffled(self, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        which, lengths, starts = [], [], []
        for record, keep in zip(self.records, self._keep, strict=True):
            own = self._meta(record)["tokens"]
            which.append(np.full(int(keep.sum()), record.number, np.int32))
            lengths.append(own[keep])
            starts.append((np.cumsum(own, dtype=np.int64) - own)[keep])

        def path_of(part: int) -> Path:
            return part_files(self.directory, part)["bin"]

        columns = [np.concatenate(column) for column in (which, starts, lengths)]
        return shuffled(path_of, self.writer.dtype, columns[0], columns[1], columns[2], seed)
