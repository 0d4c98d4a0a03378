"""Best fit, many records at a time, against best fit one record at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zeropipe.trainer.data.packing import best_fit, single


def one_at_a_time(lengths: list[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for record in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
        free = [capacity - sum(max(1, lengths[k]) for k in row) for row in rows]
        fitting = [row for row in range(len(rows)) if free[row] >= max(1, lengths[record])]
        if fitting:
            rows[min(fitting, key=lambda row: (free[row], row))].append(record)
        else:
            rows.append([record])
    return rows


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=40), st.integers(12, 20))
def test_it_fills_rows_as_one_record_at_a_time_does(lengths, capacity):
    rows, expected = best_fit(np.array(lengths, np.int64), capacity), one_at_a_time(lengths, capacity)
    assert sorted(len(row) for row in expected) == sorted(len(rows[k]) for k in range(len(rows)))
    sums = [sorted(lengths[k] for k in row) for row in expected]
    assert sorted(sums) == sorted(sorted(lengths[k] for k in rows[row]) for row in range(len(rows)))


@pytest.mark.parametrize("seed", range(3))
def test_every_record_lies_in_one_row_and_fits(seed):
    lengths = np.random.default_rng(seed).integers(1, 513, 50_000)
    rows = best_fit(lengths, 512)
    assert sorted(rows.records.tolist()) == list(range(len(lengths)))
    sums = np.add.reduceat(lengths[rows.records], rows.bounds[:-1])
    assert sums.max() <= 512
    assert len(rows) <= 1.01 * lengths.sum() / 512 + 1  # of random lengths next to nothing is lost
    again = best_fit(lengths, 512)
    assert np.array_equal(again.records, rows.records) and np.array_equal(again.bounds, rows.bounds)


def test_one_a_row():
    rows = single(3)
    assert len(rows) == 3 and [rows[k].tolist() for k in range(3)] == [[0], [1], [2]]
