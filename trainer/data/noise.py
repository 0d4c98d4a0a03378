"""NEFTune (Jain et al., arXiv:2310.05914): in training, uniform noise on the embedding of every place of a record.

Each number follows from (seed, index of the sample in the run, record in the sample, place in the record, dimension) by
SplitMix64, so that every layout adds the same and there is no generator state: a batch carries a key for each place,
and the device that holds the embedding hashes the dimensions.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ...data_prep.splitmix import INCREMENT, mix64
from .order import key64

if TYPE_CHECKING:
    from .samples import Record

POINT = 32  # bits of an amplitude after its point: floats may be cast to half on their way to the device
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)), (31, 1))  # of `mix64`


def noise_of(records: Sequence[Record], alpha: float) -> Tensor:
    """int64 [records, time, 2]: of every place a key, and alpha / sqrt(places of its record), 0 where there is none.

    Args:
        records: of one length, as training draws them.
    """
    return torch.from_numpy(np.stack([_of_row(record, alpha) for record in records]))


def _of_row(record: Record, alpha: float) -> np.ndarray:
    assert record.drawn is not None and record.texts is not None
    seed, sample = record.drawn
    inside, text = record.texts >= 0, np.maximum(record.texts, 0)
    places = np.bincount(text[inside], minlength=1)[text]
    amplitudes = np.where(inside, np.rint(alpha * 2**POINT / np.sqrt(np.maximum(places, 1))), 0).astype(np.int64)
    positions = np.arange(len(text)) if record.positions is None else record.positions
    step = np.uint64(INCREMENT)
    keys = mix64(np.uint64(key64(seed, "neftune", sample)) + text.astype(np.uint64) * step)
    return np.stack([mix64(keys + positions.astype(np.uint64) * step).view(np.int64), amplitudes], -1)


def embedding_noise(noise: Tensor, width: int) -> Tensor:
    """fp32 [rows, time, width], uniform within ± alpha / sqrt(places x width), from `noise_of` [rows, time, 2]."""
    keys, amplitudes = noise.unbind(-1)
    dimensions = torch.arange(1, width + 1, device=noise.device) * (INCREMENT - (1 << 64))
    hashed = keys[..., None] + dimensions
    for shift, factor in _ROUNDS:
        hashed ^= (hashed >> shift) & ((1 << (64 - shift)) - 1)  # the shift is arithmetic, SplitMix64's is not
        hashed *= factor
    uniform = (hashed >> 40).float().add_(0.5).mul_(2.0**-23)  # 24 bits, in (-1, 1) and symmetric
    return uniform.mul_((amplitudes * (2.0**-POINT / math.sqrt(width)))[..., None])


def with_noise(embedded: Tensor, noise: Tensor) -> Tensor:
    """Embeddings [rows, time, width] with their noise."""
    return embedded + embedding_noise(noise, embedded.shape[-1]).to(embedded.dtype)


@contextlib.contextmanager
def noisy(embedding: nn.Module, noise: Tensor | None) -> Iterator[None]:
    """What the embedding puts out inside has this noise added."""
    if noise is None:
        yield
        return

    def add(_module: nn.Module, _inputs: tuple, output: Any) -> Tensor:
        return with_noise(output, noise)

    hook = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
