"""What one worker does with one task: read, filter, encode, and leave a part on disk with a record of it.

A part is three files in `parts/`: the tokens, one `META` entry per document, and last the record. It is whole or not
there, and the same whoever made it.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import xxhash

from ..corpus.documents import read_documents
from ..corpus.slices import BadDocument
from ..corpus.sources import Task
from ..errors import UserError
from .encoding import make_encoder

if TYPE_CHECKING:
    from ..records.settings import RecordJob

META = np.dtype([("tokens", "<i4"), ("bytes", "<i8"), ("digest", "<u8", 2)])
BATCH_BYTES = 2 << 20
BATCH_DOCUMENTS = 8192
EXAMPLES = 3  # bad documents of a task that are described


@dataclass(frozen=True)
class Filters:
    """Which documents are kept; sizes in bytes of UTF-8."""

    min_bytes: int = 0
    max_bytes: int | None = None
    keep: str | None = None  # regular expressions, searched in the text
    drop: str | None = None


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know; the same for every task."""

    parts: str
    tokenizer: str
    encoder: str
    dtype: str
    eod_id: int | None  # ends each document
    text_key: str
    on_error: str  # stop | skip
    filters: Filters
    cache_memory: int  # bytes that a worker may grow by, before its encoder's caches are emptied
    records: RecordJob | None = None  # what is read are records, not texts


@dataclass
class TaskRecord:
    """What a finished task left. `digests`: xxh3-128 of the part's files."""

    number: int
    source: str = ""  # digest of the slices and of their files' size and time of change
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    stop_ids: list[int] = field(default_factory=list)  # of records: tokens that end generation, as far as learnt


OnBatch = Callable[[int, int, int], None]  # documents, tokens and bytes of text added


class Worker:
    """Runs tasks one after the other, keeping the encoder between them."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.keep = compile_pattern("--keep-regex", job.filters.keep)
        self.drop = compile_pattern("--drop-regex", job.filters.drop)
        self._filtered = job.filters != Filters()
        self._open()

    def _open(self) -> None:
        self.encoder = make_encoder(self.job.encoder, Path(self.job.tokenizer), self.job.cache_memory)
        self.eod = np.array([self.job.eod_id])

    def run(self, task: Task, progress: OnBatch = lambda documents, tokens, text_bytes: None) -> TaskRecord:
        """Makes the part of a task. Calls `progress` after each batch with what was added."""
        record = TaskRecord(task.number, task_source(task))
        files = part_files(Path(self.job.parts), task.number)
        temporary = {kind: path.with_name(f"{path.name}.{os.getpid()}.tmp") for kind, path in files.items()}
        with temporary["bin"].open("wb") as tokens_file, temporary["meta"].open("wb") as meta_file:
            digests = {"bin": xxhash.xxh3_128(), "meta": xxhash.xxh3_128()}
            for batch in self._batches(task, record):
                tokens, meta = self._encode(batch, record)
                for kind, file, data in (("bin", tokens_file, tokens), ("meta", meta_file, meta)):
                    _write(file, data, digests[kind])
                record.documents += len(meta)
                record.tokens += len(tokens)
                record.text_bytes += (added := int(meta["bytes"].sum()))
                progress(len(meta), len(tokens), added)
        record.digests = {kind: digest.hexdigest() for kind, digest in digests.items()}
        for kind in digests:
            temporary[kind].replace(files[kind])
        temporary["json"].write_text(json.dumps(vars(record)), "utf-8")
        temporary["json"].replace(files["json"])
        return record

    def _batches(self, task: Task, record: TaskRecord) -> Iterator[list[Any]]:
        batch: list[Any] = []
        size = 0
        for document in self._documents(task, record):
            batch.append(document)
            size += len(document)
            if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _documents(self, task: Task, record: TaskRecord) -> Iterator[Any]:
        """The documents to keep, of which `len` is the size in bytes; counts the others by why they are not."""
        counts = record.counts
        for part in task.slices:
            for document in read_documents(part, self.job.text_key, partial(self._bad, record)):
                counts["read"] += 1
                if not document:
                    counts["empty"] += 1
                elif not self._dropped(document, counts):
                    yield document

    def _bad(self, record: TaskRecord, problem: BadDocument) -> None:
        """Raises what is wrong with a document, or counts it."""
        if self.job.on_error == "stop":
            raise problem
        record.counts["invalid"] += 1
        if len(record.examples) < EXAMPLES:
            record.examples.append(problem.describe())

    def _dropped(self, document: bytes, counts: Counter[str]) -> bool:
        """Whether the filters drop it; then it is counted."""
        reason = self._reason(document, self.job.filters) if self._filtered else None
        if reason:
            counts[reason] += 1
        return reason is not None

    def _reason(self, document: bytes, filters: Filters) -> str | None:
        if len(document) < filters.min_bytes:
            return "too short"
        if filters.max_bytes is not None and len(document) > filters.max_bytes:
            return "too long"
        if self.keep and not self.keep.search(document.decode()):
            return "not matching --keep-regex"
        if self.drop and self.drop.search(document.decode()):
            return "matching --drop-regex"
        return None

    def _encode(self, batch: list[Any], record: TaskRecord) -> tuple[np.ndarray, np.ndarray]:
        """Tokens with an end-of-document token after each document, in the store's type; and the documents' META."""
        del record  # of records only more is noted there
        rows = self.encoder.encode(batch)
        pieces = [self.eod] * (2 * len(rows))
        pieces[::2] = rows
        tokens = np.concatenate(pieces, dtype=self.job.dtype, casting="unsafe")  # all are below the vocabulary size
        return tokens, describe([len(row) + 1 for row in rows], [len(document) for document in batch], batch)


def describe(tokens: list[int], sizes: list[int], documents: Sequence[Any]) -> np.ndarray:
    """META of documents: their tokens, bytes of text, and what they are compared by."""
    meta = np.empty(len(documents), META)
    meta["tokens"], meta["bytes"] = tokens, sizes
    digests = b"".join([xxhash.xxh3_128_digest(document) for document in documents])
    meta["digest"] = np.frombuffer(digests, "<u8").reshape(-1, 2)
    return meta


def _write(file: BinaryIO, data: np.ndarray, digest: Any) -> None:
    raw = np.ascontiguousarray(data).view(np.uint8).data
    file.write(raw)
    digest.update(raw)


def part_files(parts: Path, number: int) -> dict[str, Path]:
    """The files of a part by kind: tokens, META entries, record."""
    return {kind: parts / f"{number:07d}.{kind}" for kind in ("bin", "meta", "json")}


def task_source(task: Task) -> str:
    """Changes when what the task reads changes."""
    digest = xxhash.xxh3_128(repr(task.slices).encode())
    for path in dict.fromkeys(part.path for part in task.slices):
        stat = os.stat(path)
        digest.update(f"{stat.st_size} {stat.st_mtime_ns};".encode())
    return digest.hexdigest()


def finished(parts: Path, task: Task) -> TaskRecord | None:
    """The record of a task that was finished before, if its input and its files are as they were then; else None."""
    files = part_files(parts, task.number)
    try:
        content = json.loads(files["json"].read_text("utf-8"))
        record = TaskRecord(**{**content, "counts": Counter(content["counts"])})
        whole = all(file_digest(files[kind]) == digest for kind, digest in record.digests.items())
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return record if whole and record.source == task_source(task) else None


def file_digest(path: Path) -> str:
    """xxh3-128 of a file, in bounded memory."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def compile_pattern(option: str, pattern: str | None) -> re.Pattern[str] | None:
    """The pattern of an option. UserError if it is none."""
    if pattern is None:
        return None
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{option} {pattern!r}: not a valid regular expression: {error}") from None
