"""Records into rows of bounded length by best fit decreasing (Johnson, "Near-optimal bin packing algorithms", 1973).

Lengths come in few different values, so rows are filled for all records of a length at once: millions take seconds.
Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rows:
    """Which records lie in which row: row k holds `records[bounds[k] : bounds[k + 1]]`, in this order."""

    records: np.ndarray  # int64 [number of records]
    bounds: np.ndarray  # int64 [rows + 1]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.records[self.bounds[row] : self.bounds[row + 1]]


def single(number: int) -> Rows:
    """Every record a row of its own."""
    return Rows(np.arange(number), np.arange(number + 1))


def best_fit(lengths: np.ndarray, capacity: int) -> Rows:
    """The longest records first, each into the fullest row that has room; of equals the earlier.

    Args:
        lengths: [records], none above `capacity`.
    """
    order = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(lengths), np.int64)
    room: dict[int, list[np.ndarray]] = {}  # rows by the places that are free in them
    rows = 0
    values, starts, counts = np.unique(-lengths[order], return_index=True, return_counts=True)
    for value, start, count in zip(-values, starts, counts, strict=True):
        pending = order[start : start + count]
        for free in sorted(free for free in room if free >= value):
            if not len(pending):
                break
            open_rows = np.sort(np.concatenate(room.pop(free)))
            placed, filled = _fill(pending, open_rows, int(value), free, row_of)
            pending = pending[placed:]
            _give_back(room, open_rows, filled, free)
        if len(pending):
            fresh = np.arange(rows, rows - (-len(pending) // _fits(int(value), capacity)))
            rows += len(fresh)
            _, filled = _fill(pending, fresh, int(value), capacity, row_of)
            _give_back(room, fresh, filled, capacity)
    by_row = np.argsort(row_of[order], kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))])
    return Rows(order[by_row], bounds)


def _fits(length: int, free: int) -> int:
    """How many records of a length go into the free places of a row; empty ones are taken for one place."""
    return free // max(1, length)


def _fill(
    pending: np.ndarray, rows: np.ndarray, length: int, free: int, row_of: np.ndarray
) -> tuple[int, list[tuple[slice, int]]]:
    """Puts records of one length into rows of the same room, each row filled before the next is begun.

    Returns:
        How many were placed, and for runs of `rows` the places that are left in them.
    """
    each = _fits(length, free)
    placed = min(len(pending), each * len(rows))
    row_of[pending[:placed]] = rows[np.arange(placed) // each]
    full, rest = divmod(placed, each)
    left = [(slice(0, full), free - each * max(1, length))]
    if rest:
        left.append((slice(full, full + 1), free - rest * max(1, length)))
    left.append((slice(full + bool(rest), len(rows)), free))
    return placed, left


def _give_back(
    room: dict[int, list[np.ndarray]], rows: np.ndarray, filled: list[tuple[slice, int]], before: int
) -> None:
    for run, free in filled:
        if free > 0 and len(rows[run]):
            room.setdefault(free, []).append(rows[run])
