"""Long series made short without losing what stands out."""

from __future__ import annotations

import numpy as np


def kept(values: np.ndarray, points: int) -> np.ndarray:
    """Places, ascending, of at most `points` of the values: both ends, and the extremes of equal stretches.

    What is no number counts as an extreme of its stretch: the first of them is kept.
    """
    if len(values) <= points:
        return np.arange(len(values))
    wanted = max(1, (points - 2) // (2 if np.isfinite(values).all() else 3))
    length = -(-len(values) // wanted)
    stretches = -(-len(values) // length)
    padded = np.full(stretches * length, np.nan)
    padded[: len(values)] = values
    table = padded.reshape(stretches, length)
    fine = np.isfinite(table)
    there = np.arange(table.size).reshape(table.shape) < len(values)
    first = np.arange(stretches) * length
    chosen = [np.array([0, len(values) - 1])]
    for found, of in (
        (np.where(fine, table, np.inf).argmin(1), fine),
        (np.where(fine, table, -np.inf).argmax(1), fine),
        ((there & ~fine).argmax(1), there & ~fine),
    ):
        chosen.append((first + found)[of.any(1)])
    return np.unique(np.concatenate(chosen))


def rounded(values: np.ndarray, digits: int = 5) -> list[float | None]:
    """For a page: so many significant digits; None for what is no number."""
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values.tolist()]
