"""Token stores, read side: a directory of Megatron `.bin/.idx` shards seen as one stream of tokens."""

from __future__ import annotations

import hashlib
import mmap
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UserError
from .index import Index, IndexFile, counted, leaves_ends_out
from .manifest import STORE_MANIFEST, Manifest

# flags of a token in a store of records (`.mask`)
TRAINED = 1  # it is learnt: predicting it counts in the loss
BEGINS = 2  # it is the first of a text; of a pair the chosen text comes first, then the rejected one

SAMPLES = 64  # blocks of a bare prefix that its fingerprint is made of
SAMPLE_BYTES = 4096


class Shard:
    """One `.bin/.idx` pair, memory-mapped. Positions are tokens from the start of the `.bin`."""

    def __init__(self, prefix: Path, masked: bool = False, count_ends: bool = False) -> None:
        """
        Args:
            masked: with a `.mask` beside them.
            count_ends: where the `.idx` leaves the documents' last tokens out (`leaves_ends_out`), see a whole index.
        """
        self.prefix = prefix
        self.bin, self.idx = with_suffix(prefix, ".bin"), with_suffix(prefix, ".idx")
        if not self.bin.is_file():
            raise UserError(f"{self.bin}: no such file: a pair {self.bin.name} + {self.idx.name} was expected")
        self.index: Index = IndexFile(self.idx)
        self.dtype = self.index.header.dtype
        size = self.bin.stat().st_size
        self.tokens = _mapped(self.bin, self.dtype) if size and not size % self.dtype.itemsize else _none(self.dtype)
        self.end: int | None = None  # the token behind each document, where the .idx leaves it out
        if (promised := self._promised()) != size:
            self._mend(size, promised, count_ends)
        self.num_tokens = len(self.tokens)
        self.num_documents = max(0, self.index.header.entries - 1)
        self.flags = self._flags() if masked else None

    def _flags(self) -> np.ndarray:
        path = with_suffix(self.prefix, ".mask")
        size = path.stat().st_size if path.is_file() else None
        if size != self.num_tokens:
            found = "is not there" if size is None else f"holds {size} bytes"
            raise UserError(
                f"{path}: {found}, one for each of {self.num_tokens} tokens were expected; prepare it again"
            )
        return _mapped(path, np.dtype(np.uint8)) if size else np.empty(0, np.uint8)

    def _promised(self) -> int:
        """Bytes of the .bin by the index: where its last sequence ends."""
        if not self.index.header.sequences:
            return 0
        return int(self.index.offsets[-1]) + int(self.index.lengths[-1]) * self.dtype.itemsize

    def _mend(self, size: int, promised: int, count_ends: bool) -> None:
        """Takes the boundaries from the .bin where that can be, and is asked for; UserError otherwise."""
        found = counted(self.index, self.tokens) if leaves_ends_out(self.index, len(self.tokens)) else None
        words = f"{self.bin}: {size} bytes, but {self.idx.name} describes {promised}"
        if found is None:
            raise UserError(f"{words}: the file is truncated or damaged; copy or prepare it again")
        if not count_ends:
            raise UserError(
                f"{words}: it leaves out the token {found[1]} behind each document, as Megatron-DeepSpeed's "
                f"preprocess_data.py --append-eod does. `zeropipe prepare --import {self.prefix} --tokenizer FOLDER "
                "--output STORE` makes a store with the right boundaries, which the .bin tells"
            )
        self.index, self.end = found

    def read_in_order(self) -> Shard:
        """Tells the system that this shard is about to be read from end to end."""
        if self.num_tokens:
            _map_of(self.tokens).madvise(mmap.MADV_SEQUENTIAL)
        return self

    def document_start(self, document: int) -> int:
        """First token of a document; `num_tokens` for the one after the last."""
        sequence = int(self.index.documents[document])
        if sequence == self.index.header.sequences:
            return self.num_tokens
        return int(self.index.offsets[sequence]) // self.dtype.itemsize


class TokenStore:
    """The documents of a store, in order, as one stream of tokens.

    Opening reads the manifest and one header per shard, whatever the size; nothing is hashed (that is `verify`'s work).
    """

    def __init__(self, path: Path, shards: list[Shard], manifest: Manifest | None) -> None:
        self.path = path
        self.shards = shards
        self.manifest = manifest
        self._token_ends = list(accumulate(shard.num_tokens for shard in shards))
        self._document_ends = list(accumulate(shard.num_documents for shard in shards))
        self.num_tokens: int = self._token_ends[-1]
        self.num_documents: int = self._document_ends[-1]
        self.dtype: np.dtype = shards[0].dtype
        self.vocab_size = manifest.vocab_size if manifest else None
        self.eod_id = manifest.eod_id if manifest else None
        self.text_bytes = manifest.text_bytes if manifest else None
        self.records = manifest.records if manifest else None
        self.kind = self.records.kind if self.records else "text"  # text | sft | dpo
        self.stop_ids = self.records.stop_ids if self.records else []  # tokens that end what is learnt
        self.tokenizer = path / "tokenizer" if manifest and manifest.tokenizer else None
        self.fingerprint: str = manifest.fingerprint if manifest else sampled_fingerprint(shards)

    @classmethod
    def open(cls, path: str | Path, count_ends: bool = False) -> TokenStore:
        """Opens a store directory, or a bare Megatron prefix. UserError if it is missing, truncated or not a store.

        Args:
            count_ends: of a prefix: as for `Shard`.
        """
        path = Path(path)
        if path.is_dir():
            return cls._open_directory(path)
        prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
        if not with_suffix(prefix, ".idx").exists():
            raise UserError(
                f"{path}: no token store here: expected a directory with {STORE_MANIFEST}, or a Megatron prefix with "
                f"{prefix.name}.bin and {prefix.name}.idx. Make one with `zeropipe prepare --output {path}`"
            )
        return cls(prefix, [Shard(prefix, count_ends=count_ends)], None)

    @classmethod
    def _open_directory(cls, path: Path) -> TokenStore:
        if not (path / STORE_MANIFEST).exists():
            raise UserError(f"{path}: the directory holds no {STORE_MANIFEST}, so it is no token store")
        manifest = Manifest.load(path)
        shards = [Shard(path / record.name, record.mask is not None) for record in manifest.shards]
        if not shards:
            raise UserError(f"{path}: the store holds no shard")
        for shard, record in zip(shards, manifest.shards, strict=True):
            found = (shard.num_documents, shard.num_tokens, shard.dtype)
            if found != (record.documents, record.tokens, np.dtype(manifest.dtype)):
                raise UserError(
                    f"{shard.prefix}: holds {shard.num_documents} documents, {shard.num_tokens} tokens, {shard.dtype}; "
                    f"the manifest says {record.documents}, {record.tokens} and {manifest.dtype}"
                )
        return cls(path, shards, manifest)

    def document_start(self, document: int) -> int:
        """Token offset of a document in the stream; `document == num_documents` gives `num_tokens`."""
        if document == self.num_documents:
            return self.num_tokens
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents}")
        which = bisect_right(self._document_ends, document)
        shard = self.shards[which]
        local = document - (self._document_ends[which] - shard.num_documents)
        return self._token_ends[which] - shard.num_tokens + shard.document_start(local)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, int64."""
        return self._read(start, stop, np.empty(stop - start, np.int64), lambda shard: shard.tokens)

    def flags(self, start: int, stop: int) -> np.ndarray:
        """Flags of tokens [start, stop) of a store of records, uint8: `TRAINED`, `BEGINS`."""
        assert self.records is not None
        return self._read(start, stop, np.empty(stop - start, np.uint8), lambda shard: shard.flags)

    def document_lengths(self) -> np.ndarray:
        """Tokens of every document, int64 [num_documents]; reads the whole index."""
        starts = [
            np.append(shard.index.offsets, shard.bin.stat().st_size)[np.asarray(shard.index.documents)]
            for shard in self.shards
        ]
        return np.concatenate([np.diff(own) for own in starts]).astype(np.int64) // self.dtype.itemsize

    def _read(self, start: int, stop: int, out: np.ndarray, column: Callable[[Shard], Any]) -> np.ndarray:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.num_tokens}")
        position, which = start, bisect_right(self._token_ends, start)
        while position < stop:
            shard, end = self.shards[which], self._token_ends[which]
            base, upto = end - shard.num_tokens, min(stop, end)
            out[position - start : upto - start] = column(shard)[position - base : upto - base]
            position, which = upto, which + 1
        return out

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Stream offsets in [start, stop) at which documents begin, int64, ascending.

        Binary search over single entries of the index: about 30 reads for a billion documents.
        """
        first = bisect_left(range(self.num_documents), start, key=self.document_start)
        last = bisect_left(range(self.num_documents), stop, lo=first, key=self.document_start)
        return np.fromiter((self.document_start(document) for document in range(first, last)), np.int64, last - first)


def _none(dtype: np.dtype) -> np.ndarray:
    return np.empty(0, dtype)


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """A file as a plain array: `np.memmap` objects themselves are several times slower to slice.

    Training reads at random. Without the advice each cold read drags in its neighbourhood: 181 ms for a batch of 64
    samples from a cold disk, 6 ms with it.
    """
    mapped = np.memmap(path, dtype, "r")
    _map_of(mapped).madvise(mmap.MADV_RANDOM)
    return mapped.view(np.ndarray)


def _map_of(array: np.ndarray) -> mmap.mmap:
    """The memory map that an array of `_mapped` looks at."""
    base: Any = array
    while not isinstance(base, mmap.mmap):
        base = base.base
    return base


def with_suffix(prefix: Path, suffix: str) -> Path:
    """`corpus.v1` + `.bin` is `corpus.v1.bin`: unlike `Path.with_suffix`, keeps the dots of the name."""
    return prefix.with_name(prefix.name + suffix)


def sampled_fingerprint(shards: list[Shard]) -> str:
    """Hex digest of sizes, headers and evenly spread blocks of both files: constant time for any size.

    Serves bare Megatron prefixes, which have no manifest. A change between the blocks goes unseen.
    """
    digest = hashlib.sha256()
    for shard in shards:
        for path in (shard.idx, shard.bin):
            size = path.stat().st_size
            digest.update(f"{size};".encode())
            with path.open("rb") as file:
                for sample in range(SAMPLES):
                    file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
