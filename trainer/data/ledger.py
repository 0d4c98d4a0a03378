"""The token ledger: a digest of the samples that each step consumed; `audit.py` checks a run by it.

A digest is the sum, modulo 2**64, of a mixed hash of each (position, sample id) pair. A sum does not care which rank
consumed what in which order, and digests of parts add up to the digest of the whole; a sample that is missing, doubled
or at another position changes it.
"""

from __future__ import annotations

import numpy as np

from ...data_prep.splitmix import INCREMENT, mix64

SOURCE_BITS = 16  # of a sample id; the other 48 number the samples of one source
MASK = (1 << 64) - 1


def sample_ids(sources: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """One uint64 per sample of a mixture: the source's number in the top 16 bits, the sample's in the others."""
    return (np.asarray(sources, np.uint64) << np.uint64(64 - SOURCE_BITS)) | np.asarray(samples, np.uint64)


def hashes(positions: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Mixed uint64 hash of each pair (global sample index, sample id)."""
    # splitmix64 maps 0 to 0: with position 0 as it is, the absence of the pair (0, 0) would go unnoticed
    x = (np.asarray(positions).astype(np.uint64) + np.uint64(1)) * np.uint64(INCREMENT) + np.asarray(ids).astype(
        np.uint64
    )
    return mix64(x)


def digest(positions: np.ndarray, ids: np.ndarray) -> int:
    """Digest of the pairs (global sample index, sample id); the sum over any split of the pairs, modulo 2**64.

    Args:
        positions: global sample indices of the run, integers >= 0, any shape.
        ids: ids of the samples consumed there (see `sample_ids`), the same shape.
    """
    return int(hashes(positions, ids).sum(dtype=np.uint64))


def split(value: int) -> list[float]:
    """The digest as two floats, exact when summed over up to 2**21 ranks in float64; `join` puts the sums together."""
    return [float(value & 0xFFFFFFFF), float(value >> 32)]


def join(parts: list[float]) -> int:
    """The digest whose halves, as `split` gave them, were summed over ranks."""
    low, high = parts
    return (int(low) + (int(high) << 32)) & MASK
