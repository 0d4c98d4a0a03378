"""Writes the shards of a token store, digests included, in one pass over the tokens.

Tokens that come with flags (`index.flagged`) leave a third file beside `.bin` and `.idx`: `.mask`, one byte a token.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from .errors import UserError
from .index import write_index
from .manifest import FileRecord, ShardRecord, file_record

MAX_DOCUMENT = 2**31 - 1  # tokens: lengths are int32 in the .idx


class ShardWriter:
    """Appends documents to `shard-00000`, `shard-00001`, …; a shard ends before it would pass `shard_bytes` of tokens.

    Where a shard ends depends on the documents alone, not on how `append` was called. Use as a context manager.
    """

    def __init__(self, directory: Path, dtype: np.dtype, shard_bytes: int, single: str | None = None) -> None:
        """`single`: the name of the only shard, whatever its size, instead of numbered ones."""
        self.directory = directory
        self.dtype = dtype
        self.single = single
        self._types = [dtype[name] for name in dtype.names] if dtype.names else [dtype]  # of .bin, and of .mask
        self.limit = max(1, shard_bytes // self._types[0].itemsize) if single is None else 2**62
        self.records: list[ShardRecord] = []
        self._open_shard()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.finish()
        for file in self._files:
            file.close()

    def append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Adds documents: their tokens one after the other (dtype of the store) and their lengths in tokens, [N]."""
        if len(lengths) and int(lengths.max()) > MAX_DOCUMENT:
            raise UserError(f"a document of {int(lengths.max())} tokens: the .idx format holds at most {MAX_DOCUMENT}")
        ends = np.cumsum(lengths, dtype=np.int64)
        first = base = 0
        while first < len(lengths):
            fit = int(np.searchsorted(ends, base + self.limit - self._tokens, side="right"))
            if fit == first and self._tokens == 0:
                fit = first + 1  # a document longer than a shard has one to itself
            if fit > first:
                stop = int(ends[fit - 1])
                self._write(tokens[base:stop], lengths[first:fit])
                first, base = fit, stop
            if first < len(lengths):
                self._close_shard()
                self._open_shard()

    def finish(self) -> list[ShardRecord]:
        """Closes the last shard and returns what was written. A corpus without documents leaves one empty shard."""
        if not self._files[0].closed:
            self._close_shard()
        return self.records

    def _open_shard(self) -> None:
        self._name = self.single or f"shard-{len(self.records):05d}"
        suffixes = ("bin", "mask") if self.dtype.names else ("bin",)
        self._files = [(self.directory / f"{self._name}.{suffix}").open("wb") for suffix in suffixes]
        self._digests = [hashlib.sha256() for _ in suffixes]
        self._lengths: list[np.ndarray] = []
        self._tokens = 0

    def _write(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        columns = [tokens[name] for name in self.dtype.names] if self.dtype.names else [tokens]
        for file, digest, column, dtype in zip(self._files, self._digests, columns, self._types, strict=True):
            data = np.ascontiguousarray(column, dtype).data
            file.write(data)
            digest.update(data)
        self._lengths.append(np.array(lengths, np.int32))
        self._tokens += len(tokens)

    def _close_shard(self) -> None:
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        lengths = np.concatenate(self._lengths) if self._lengths else np.empty(0, np.int32)
        idx = self.directory / f"{self._name}.idx"
        write_index(idx, self._types[0], lengths)
        binary, *mask = (
            FileRecord(self._tokens * dtype.itemsize, digest.hexdigest())
            for dtype, digest in zip(self._types, self._digests, strict=True)
        )
        self.records.append(ShardRecord(self._name, len(lengths), self._tokens, binary, file_record(idx), *mask))
