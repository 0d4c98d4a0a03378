"""Megatron's MMapIndexedDataset v1: the `.idx` file that goes with a `.bin` of tokens (little-endian, packed).

0   9 B       b"MMIDIDX\\x00\\x00"
9   u64       version = 1
17  u8        code of the token type, see `_DTYPES`
18  u64       N sequences
26  u64       D entries of the document index
34  int32[N]  lengths in tokens, then int64[N] byte offsets into .bin, then int64[D] first sequence of each document
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from .errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
OLD_MAGIC = b"TNTIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_CODES = {np.dtype(name): code for code, name in _DTYPES.items()}
_BLOCK = 1 << 20  # entries computed at a time when an .idx is written


class Header(NamedTuple):
    """What the first 34 bytes of an .idx say."""

    dtype: np.dtype
    sequences: int
    entries: int  # of the document index: documents + 1

    @property
    def size(self) -> int:
        """Bytes that an .idx with this header must have."""
        return HEADER.size + 12 * self.sequences + 8 * self.entries


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where the vocabulary fits as Megatron judges it, else int32."""
    return np.dtype("<u2" if vocab_size < 65_500 else "<i4")


def flagged(dtype: np.dtype) -> np.dtype:
    """Tokens of a type, each with a byte of flags (`.mask`): `token` and `flags`."""
    return np.dtype([("token", dtype), ("flags", "u1")])


def read_header(path: Path) -> Header:
    """Reads the 34 bytes at the start of an .idx. UserError if it is not mmap format v1 with integer tokens."""
    try:
        with path.open("rb") as file:
            raw = file.read(HEADER.size)
    except OSError as error:
        raise UserError(f"{path}: cannot read the index: {error.strerror}") from None
    if raw.startswith(OLD_MAGIC):
        raise UserError(
            f"{path}: this is the old non-mmap format of Megatron/fairseq (TNTIDX). Convert it to the mmap format "
            "first (`--dataset-impl mmap` of the preprocessing that made it); only that is read here"
        )
    if not raw.startswith(MAGIC):
        raise UserError(f"{path}: not a Megatron mmap index: it begins {raw[:9]!r}, expected {MAGIC!r}")
    if len(raw) < HEADER.size:
        raise UserError(f"{path}: truncated: {len(raw)} bytes, the header alone has {HEADER.size}")
    _, version, code, sequences, entries = HEADER.unpack(raw)
    if version != 1:
        raise UserError(f"{path}: version {version} of the mmap index, only version 1 is known")
    if code not in _DTYPES or code in (6, 7):
        raise UserError(f"{path}: token type code {code} does not stand for an integer type")
    return Header(np.dtype(_DTYPES[code]), sequences, entries)


class Index(Protocol):
    """What a `.bin` holds: lengths int32 [N] in tokens, offsets int64 [N] in bytes, documents int64 [D], the first
    sequence of each and N at last.
    """

    header: Header
    lengths: np.ndarray
    offsets: np.ndarray
    documents: np.ndarray


class IndexFile:
    """The three arrays of one .idx, memory-mapped: opening reads the header and nothing else.

    The int64 arrays start at odd addresses (34 + 4 N), and NumPy's own `searchsorted` would copy an unaligned array
    whole. So nothing here calls it; look-ups read single entries.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = header = read_header(path)
        size = path.stat().st_size
        if size != header.size:
            raise UserError(
                f"{path}: {size} bytes, but its header promises {header.sequences} sequences and "
                f"{header.entries} document entries, which is {header.size} bytes: the file is truncated or damaged"
            )
        raw = np.memmap(path, np.uint8, "r").view(np.ndarray)
        ends = np.cumsum([HEADER.size, 4 * header.sequences, 8 * header.sequences, 8 * header.entries])
        self.lengths = raw[ends[0] : ends[1]].view("<i4")
        self.offsets = raw[ends[1] : ends[2]].view("<i8")
        self.documents = raw[ends[2] : ends[3]].view("<i8")


@dataclass
class CountedIndex:
    """An index made whole in memory: every document is one sequence, with its last token."""

    header: Header
    lengths: np.ndarray
    offsets: np.ndarray
    documents: np.ndarray


def leaves_ends_out(index: Index, tokens: int) -> bool:
    """Whether a `.bin` of so many tokens has one more for each document that holds anything than its index tells.

    Megatron-DeepSpeed's `preprocess_data.py --append-eod` writes a token behind each document and does not count it, so
    that every document begins one token later than its index says for each one before it.
    """
    documents, sequences = index.documents, index.header.sequences
    if not sequences or not len(documents) or documents[0] != 0 or documents[-1] != sequences:
        return False
    promised = int(index.offsets[-1]) // index.header.dtype.itemsize + int(index.lengths[-1])
    return tokens == promised + np.count_nonzero(np.diff(documents))


def counted(index: Index, tokens: np.ndarray) -> tuple[CountedIndex, int] | None:
    """The index with the ends of the documents counted, and the token that is at each; None where the tokens there are
    not all the same, so that something else is wrong. Empty documents, which have no such token, are left out.
    """
    sums = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])
    lengths = np.diff(sums[np.asarray(index.documents)])
    lengths = lengths[lengths > 0] + 1
    ends = np.cumsum(lengths)
    if not len(ends) or ends[-1] != len(tokens):
        return None
    end = tokens[-1]
    for start in range(0, len(ends), _BLOCK):
        if (tokens[ends[start : start + _BLOCK] - 1] != end).any():
            return None
    header = Header(index.header.dtype, len(lengths), len(lengths) + 1)
    offsets = (ends - lengths) * header.dtype.itemsize
    return CountedIndex(header, lengths.astype(np.int32), offsets, np.arange(len(lengths) + 1)), int(end)


def runs(lengths: np.ndarray, limit: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges [first, stop) of documents of at most `limit` tokens together, or of one longer document."""
    ends = np.cumsum(lengths, dtype=np.int64)
    first = 0
    while first < len(lengths):
        base = int(ends[first - 1]) if first else 0
        stop = max(first + 1, int(np.searchsorted(ends, base + limit, side="right")))
        yield first, stop
        first = stop


def write_index(path: Path, dtype: np.dtype, lengths: np.ndarray) -> None:
    """Writes an .idx in which every sequence is one document. `lengths`: int32 [N], in tokens."""
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, _CODES[dtype], len(lengths), len(lengths) + 1))
        file.write(np.ascontiguousarray(lengths, "<i4").data)
        for offsets in _offsets(lengths, dtype.itemsize):
            file.write(offsets.data)
        for start in range(0, len(lengths) + 1, _BLOCK):
            file.write(np.arange(start, min(start + _BLOCK, len(lengths) + 1), dtype="<i8").data)


def _offsets(lengths: np.ndarray, itemsize: int) -> Iterator[np.ndarray]:
    """Byte offset of each sequence, int64, block by block."""
    base = 0
    for start in range(0, len(lengths), _BLOCK):
        ends = base + np.cumsum(lengths[start : start + _BLOCK], dtype="<i8") * itemsize
        block = np.empty_like(ends)
        block[0], block[1:] = base, ends[:-1]
        base = int(ends[-1])
        yield block
