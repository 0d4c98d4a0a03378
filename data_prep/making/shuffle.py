"""A deterministic shuffle of documents that lie in many parts, read piece by piece."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ..index import runs
from ..splitmix import INCREMENT, mix64

_BLOCK_TOKENS = 4 << 20  # tokens gathered at a time
_OPEN_FILES = 200


def shuffled(
    path_of: Callable[[int], Path],
    dtype: np.dtype,
    which: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    seed: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of (tokens, lengths) of all documents, in the order of a hash of (seed, number of the document).

    `which`: part of each document, int32 [N]; `starts`, `lengths`: in tokens within the part, [N].
    Takes about 40 bytes of memory a document.
    """
    first_number = np.uint64((seed + 1) * INCREMENT % 2**64)
    order = np.argsort(mix64(first_number + np.arange(len(which), dtype=np.uint64)), kind="stable")
    files = _Files(path_of)
    for first, stop in runs(lengths[order], _BLOCK_TOKENS):
        chosen = order[first:stop]
        columns = zip(*(column[chosen].tolist() for column in (which, starts, lengths)), strict=True)
        pieces = [files.read(part, start * dtype.itemsize, length * dtype.itemsize) for part, start, length in columns]
        yield np.frombuffer(b"".join(pieces), dtype), lengths[chosen]
    files.close()


class _Files:
    """Descriptors of the parts used last. Reads, and no memory maps: mapped pages would count as this process's."""

    def __init__(self, path_of: Callable[[int], Path]) -> None:
        self._path_of = path_of
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, part: int, offset: int, size: int) -> bytes:
        descriptor = self._open.pop(part, None)
        if descriptor is None:
            if len(self._open) == _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            descriptor = os.open(self._path_of(part), os.O_RDONLY)
        self._open[part] = descriptor
        data = b""
        while len(data) < size:
            piece = os.pread(descriptor, size - len(data), offset + len(data))
            if not piece:
                raise EOFError(f"{self._path_of(part)} ends before {offset + size}")
            data += piece
        return data

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
