"""SplitMix64 (Steele, Lea, Flood 2014): unsigned 64-bit arithmetic alone, which no version of NumPy can change."""

from __future__ import annotations

import numpy as np

INCREMENT = 0x9E3779B97F4A7C15  # 2**64 / golden ratio; odd


def mix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection on uint64 whose output bits all depend on all input bits; maps 0 to 0."""
    x = x.astype(np.uint64, copy=True)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
