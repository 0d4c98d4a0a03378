"""Long series made short without losing what stands out."""

from __future__ import annotations

from itertools import pairwise

import numpy as np


def kept(values: np.ndarray, points: int) -> np.ndarray:
    """Places, ascending, of at most `points` of the values: both ends, and the extremes of equal stretches.

    What is no number counts as an extreme of its stretch: the first of them is kept.
    """
    if len(values) <= points:
        return np.arange(len(values))
    stretches = max(1, (points - 2) // 3)
    edges = np.linspace(0, len(values), stretches + 1).astype(int)
    chosen = {0, len(values) - 1}
    finite = np.isfinite(values)
    for first, stop in pairwise(edges):
        own, fine = values[first:stop], finite[first:stop]
        if not fine.all():
            chosen.add(int(first + np.argmin(fine)))
        if fine.any():
            chosen.add(int(first + np.argmin(np.where(fine, own, np.inf))))
            chosen.add(int(first + np.argmax(np.where(fine, own, -np.inf))))
    return np.array(sorted(chosen))


def rounded(values: np.ndarray, digits: int = 5) -> list[float | None]:
    """For a page: so many significant digits; None for what is no number."""
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values.tolist()]
