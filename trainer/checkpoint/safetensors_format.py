"""The safetensors format, for writers that stream: a header laid out from shapes alone, then raw tensors. No torch.

Format: https://github.com/huggingface/safetensors#format (u64 length of the header, JSON header, raw tensors). By hand,
because the library holds the whole file in memory, and a digest would read it once more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


S = TypeVar("S", bound=Sized)


def groups(tensors: Sequence[S], limit: int) -> list[list[S]]:
    """`tensors` in order, in groups of at most `limit` bytes; a tensor that is larger is a group of its own."""
    found: list[list[S]] = []
    filled = 0
    for tensor in tensors:
        if not found or filled + tensor.nbytes > limit:
            found.append([])
            filled = 0
        found[-1].append(tensor)
        filled += tensor.nbytes
    return found


def header(tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Length and JSON of the header, padded with blanks so that the tensors begin at a multiple of 8 bytes.

    Args:
        tensors: name, type ("F32", "BF16" …), shape and bytes of each, in the order of the file.
    """
    table: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, code, shape, nbytes in tensors:
        table[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
