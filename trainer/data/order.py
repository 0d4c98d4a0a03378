"""The data order of a run: a pure function from the index of a training sample to (source, sample).

Nothing is stored, shuffled in memory or read from disk, so that opening a corpus of a billion documents costs what a
thousand cost, and no rank, worker or world size can change what a run sees. Needs no torch.

The permutation is a Feistel network on the next even number of bits with cycle walking (Black and Rogaway, "Ciphers
with Arbitrary Finite Domains", 2002); its round function is the finaliser of SplitMix64 (Steele et al., 2014). Both use
nothing but unsigned 64-bit arithmetic, which no Python or NumPy version can change.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ...data_prep.splitmix import INCREMENT, mix64

ROUNDS = 8
_MAX_DENOMINATOR = 1 << 20  # of a mixture weight: keeps index * weight inside 64 bits up to 2**40 samples


def key64(*parts: object) -> int:
    """A 64-bit key of anything that prints: the same on every machine and version."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "little")


class Permutation:
    """A pseudo-random bijection of [0, size), evaluated element by element."""

    def __init__(self, size: int, key: int) -> None:
        if not 0 < size < 1 << 62:
            raise ValueError(f"size {size} is not between 1 and 2**62")
        self.size = size
        half_bits = max(1, math.ceil((size - 1).bit_length() / 2))
        self._half = np.uint64(half_bits)
        self._mask = np.uint64((1 << half_bits) - 1)
        self._keys = mix64(np.uint64(key) + np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(INCREMENT))

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Images of `index` (any shape, values in [0, size)), as int64."""
        index = np.asarray(index)
        if index.size and (index.min() < 0 or index.max() >= self.size):
            raise ValueError(f"index outside [0, {self.size})")
        image = self._encrypt(index.astype(np.uint64))
        while (outside := image >= np.uint64(self.size)).any():  # the domain is less than 4 times the size
            image[outside] = self._encrypt(image[outside])
        return image.astype(np.int64)

    def _encrypt(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (mix64(right ^ key) & self._mask)
        return (left << self._half) | right


@dataclass(frozen=True)
class Source:
    """What the order must know of one source: which data it is, how many samples it holds, its share of the mixture."""

    fingerprint: str  # of the tokens, their split and the sequence length
    samples: int  # in one epoch
    weight: float = 1.0


class SampleOrder:
    """Index of a training sample → (source, sample), for any index from 0 on, over as many epochs as it takes.

    Sources are interleaved by integer arithmetic: of the first n samples, source k contributes its exact share
    rounded, off by less than the number of sources, for every n. Within a source each epoch is a permutation of all its
    samples under a key of its own.

    Raises:
        ValueError: no source, an empty source, or a weight that is not positive.
    """

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        if not sources or any(source.samples < 1 or source.weight <= 0 for source in sources):
            raise ValueError("a mixture needs sources with samples and positive weights")
        self.sources = tuple(sources)
        self.seed = seed
        self._shares = _integer_shares([source.weight for source in sources])

    def sample(self, index: np.ndarray | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Source numbers and sample numbers (int64, same shape as `index`)."""
        index = np.asarray(index, dtype=np.int64)
        source, position = self._interleave(index)
        sample = np.empty_like(position)
        for k, spec in enumerate(self.sources):
            epoch = position // spec.samples
            for e in np.unique(epoch[source == k]):
                chosen = (source == k) & (epoch == e)
                permutation = Permutation(spec.samples, key64(self.seed, spec.fingerprint, int(e)))
                sample[chosen] = permutation(position[chosen] - e * spec.samples)
        return source, sample

    def counts(self, total: int) -> list[int]:
        """How many of the first `total` samples come from each source: sums to `total`."""
        counts, rest = [], total
        for share, others in self._levels():
            taken = rest * share // (share + others)
            counts.append(taken)
            rest -= taken
        return counts

    def _levels(self) -> list[tuple[int, int]]:
        """(share of a source, share of all sources after it), so that a mixture is a chain of two-way choices."""
        tails = [sum(self._shares[k + 1 :]) for k in range(len(self._shares))]
        return list(zip(self._shares, tails, strict=True))

    def _interleave(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and position within the source's own stream. Of n candidates, a level takes floor(n * share / all)."""
        source = np.full(index.shape, len(self.sources) - 1, dtype=np.int64)
        position = np.zeros_like(index)
        open_ = np.ones(index.shape, dtype=bool)
        rest = index.copy()
        for k, (share, others) in enumerate(self._levels()):
            before = rest * share // (share + others)
            takes = open_ & ((rest + 1) * share // (share + others) > before)
            source[takes], position[takes] = k, before[takes]
            open_ &= ~takes
            rest = rest - before
        return source, position


def _integer_shares(weights: Sequence[float]) -> list[int]:
    """Smallest integers in the ratio of `weights`; decimals such as 0.7 and 0.3 exactly."""
    total = sum(Fraction(str(weight)) for weight in weights)
    fractions = [(Fraction(str(weight)) / total).limit_denominator(_MAX_DENOMINATOR) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    if scale > _MAX_DENOMINATOR:  # many odd weights: round them to one common denominator
        scale = _MAX_DENOMINATOR
    shares = [max(1, round(fraction * scale)) for fraction in fractions]
    divisor = math.gcd(*shares)
    return [share // divisor for share in shares]
