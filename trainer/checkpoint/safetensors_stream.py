"""Writes safetensors files one tensor at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .safetensors_format import header

CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, entries: Sequence[Entry], read: Callable[[str], torch.Tensor]) -> None:
    """Writes one file, forced to disk. `read` gives a tensor by name; at most one is in memory at a time."""
    with path.open("wb") as file:
        file.write(header((e.name, CODES[e.dtype], e.shape, e.nbytes) for e in entries))
        for entry in entries:
            tensor = read(entry.name).to(entry.dtype).contiguous()
            assert tuple(tensor.shape) == entry.shape, (entry, tensor.shape)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
