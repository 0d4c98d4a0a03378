"""A parameter's pieces on tensor-parallel ranks: cut from the whole, and put together again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..families.specs import ParamSpec


def local_slice(full: Any, spec: ParamSpec, rank: int, size: int) -> Tensor:
    """The piece of a parameter that tensor-parallel `rank` of `size` holds, rows of padding filled with zeros.

    Args:
        full: the whole parameter in Hugging Face's shape (`spec.shape`): a tensor, or a slice of a safetensors file,
            of which only the needed part is read.
    """
    if spec.dim is None or (size == 1 and spec.padded_rows is None):
        return full[:]
    lead, limit = (slice(None),) * spec.dim, spec.shape[spec.dim]
    pieces = []
    for start, stop in spec.ranges(rank, size):
        pieces.append(full[(*lead, slice(min(start, limit), min(stop, limit)))])
        if stop > limit:
            rows = min(stop - start, stop - limit)
            pieces.append(pieces[-1].new_zeros(*spec.shape[: spec.dim], rows, *spec.shape[spec.dim + 1 :]))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, spec.dim)


def merge_slices(pieces: list[Tensor], spec: ParamSpec) -> Tensor:
    """The whole parameter in Hugging Face's shape from every tensor rank's piece: the inverse of `local_slice`."""
    if spec.dim is None:
        return pieces[0]
    full = pieces[0].new_empty(spec.padded_shape)
    for rank, piece in enumerate(pieces):
        offset = 0
        for start, stop in spec.ranges(rank, len(pieces)):
            full.narrow(spec.dim, start, stop - start).copy_(piece.narrow(spec.dim, offset, stop - start))
            offset += stop - start
    return full.narrow(spec.dim, 0, spec.shape[spec.dim])
