"""Writes safetensors files one tensor at a time: a header laid out from shapes alone, then raw tensors.

Format: https://github.com/huggingface/safetensors#format (u64 length of the header, JSON header, raw tensors). By hand,
because the library holds the whole file in memory, and a digest would read it once more. torch is imported when a
tensor is written.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

if TYPE_CHECKING:
    from torch import Tensor

_TYPES = {
    "float32": ("F32", 4),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "int64": ("I64", 8),
}  # code, bytes of an element


@dataclass(frozen=True)
class FileTensor:
    """A tensor to be written under `key` as `dtype` (torch's name); `read` gives it on the CPU when its turn comes."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _TYPES[self.dtype][1]


class ByteSink(Protocol):
    """What bytes are written to: a plain file, or one that hashes them meanwhile."""

    def write(self, data: bytes | memoryview, /) -> object: ...


def in_groups(tensors: Sequence[FileTensor], limit: int) -> list[list[FileTensor]]:
    """`tensors` in order, in groups of at most `limit` bytes; a tensor that is larger is a group of its own."""
    found: list[list[FileTensor]] = []
    filled = 0
    for tensor in tensors:
        if not found or filled + tensor.nbytes > limit:
            found.append([])
            filled = 0
        found[-1].append(tensor)
        filled += tensor.nbytes
    return found


def write_safetensors(file: ByteSink, tensors: Sequence[FileTensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes one file's content; at most one tensor is in memory at a time."""
    import torch

    file.write(_header(tensors, metadata or {}))
    for tensor in tensors:
        value = tensor.read().to(getattr(torch, tensor.dtype)).contiguous()
        assert tuple(value.shape) == tensor.shape, (tensor, value.shape)
        file.write(value.reshape(-1).view(torch.uint8).numpy().data)
        del value  # before the next one is read


def positions(tensors: Sequence[FileTensor], metadata: Mapping[str, str]) -> list[int]:
    """At which byte of the file that `write_safetensors` would write each tensor begins."""
    sizes = (tensor.nbytes for tensor in tensors)
    return list(itertools.accumulate(sizes, initial=len(_header(tensors, metadata))))[:-1]


def safetensors_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """A file's header, and at which byte its tensors begin."""
    length = int.from_bytes(file.read(8), "little")
    return json.loads(file.read(length)), 8 + length


def _header(tensors: Iterable[FileTensor], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON of the header, padded with blanks so that the tensors begin at a multiple of 8 bytes."""
    table: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for tensor in tensors:
        place = [offset, offset + tensor.nbytes]
        table[tensor.key] = {"dtype": _TYPES[tensor.dtype][0], "shape": list(tensor.shape), "data_offsets": place}
        offset += tensor.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
