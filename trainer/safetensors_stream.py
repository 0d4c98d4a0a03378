"""Writes safetensors files one tensor at a time: the format's header comes first, so it is laid out from the shapes.

Format: https://github.com/huggingface/safetensors#format (u64 length of the header, JSON header, raw tensors).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def shards(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """`entries` in order, in groups of at most `limit` bytes; a tensor that is larger is a group of its own."""
    groups: list[list[Entry]] = []
    filled = 0
    for entry in entries:
        if not groups or filled + entry.bytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.bytes
    return groups


def header(entries: Sequence[Entry]) -> bytes:
    """Length and JSON of the header, padded with spaces so that the tensors begin at a multiple of 8 bytes."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        table[entry.name] = {
            "dtype": CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.bytes],
        }
        offset += entry.bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, entries: Sequence[Entry], read: Callable[[str], torch.Tensor]) -> None:
    """Writes one file, forced to disk. `read` gives a tensor by name; at most one is in memory at a time."""
    with path.open("wb") as file:
        file.write(header(entries))
        for entry in entries:
            tensor = read(entry.name).to(entry.dtype).contiguous()
            assert tuple(tensor.shape) == entry.shape, (entry, tensor.shape)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
