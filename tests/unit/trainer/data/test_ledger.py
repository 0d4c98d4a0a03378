"""The digest of consumed samples against a plain Python splitmix64, and its algebra."""

import numpy as np
import pytest

from zeropipe.trainer.data import ledger

MASK = (1 << 64) - 1


def mix(position: int, sample: int) -> int:
    x = ((position + 1) * 0x9E3779B97F4A7C15 + sample) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_digest_equals_plain_python():
    positions = np.array([0, 1, 2, 10**12])
    ids = np.array([7, 0, 1 << 63, 3], np.uint64)
    expected = sum(mix(int(p), int(i)) for p, i in zip(positions, ids, strict=True)) & MASK
    assert ledger.digest(positions, ids) == expected
    assert ledger.digest(np.array([]), np.array([])) == 0


def test_splitmix64_reference_values():
    # state after k + 1 steps from seed 0 is (k + 1) * ODD: the generator's published first outputs for seed 0
    assert [ledger.digest(np.array([k]), np.array([0])) for k in (0, 1, 2)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_digest_does_not_depend_on_the_split_over_ranks():
    rng = np.random.default_rng(0)
    positions, ids = np.arange(1000), rng.integers(0, 1 << 48, 1000)
    whole = ledger.digest(positions, ids)
    shuffled = rng.permutation(1000)
    parts = [shuffled[rank::3] for rank in range(3)]
    assert sum(ledger.digest(positions[part], ids[part]) for part in parts) & MASK == whole
    halves = np.sum([ledger.split(ledger.digest(positions[part], ids[part])) for part in parts], axis=0)
    assert ledger.join(halves.tolist()) == whole


@pytest.mark.parametrize("defect", ["missing", "twice", "swapped", "other sample", "other position"])
def test_digest_changes_with_every_defect(defect):
    positions, ids = np.arange(64), np.arange(64) * 3
    whole = ledger.digest(positions, ids)
    if defect == "missing":
        positions, ids = positions[1:], ids[1:]
    elif defect == "twice":
        positions, ids = np.append(positions, positions[5]), np.append(ids, ids[5])
    elif defect == "swapped":
        ids[[3, 9]] = ids[[9, 3]]
    elif defect == "other sample":
        ids[10] += 1
    else:
        positions = positions + 1
    assert ledger.digest(positions, ids) != whole


def test_sample_ids_keep_sources_apart():
    ids = ledger.sample_ids(np.array([0, 1, 2]), np.array([5, 5, (1 << 48) - 1]))
    assert ids.tolist() == [5, (1 << 48) + 5, (2 << 48) + (1 << 48) - 1]
