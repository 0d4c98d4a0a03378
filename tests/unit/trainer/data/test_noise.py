"""NEFTune's noise: how it is spread, and that nothing but seed, sample, record, place and dimension is in it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.data.noise import embedding_noise, noise_of
from zeropipe.trainer.data.samples import Record
from zeropipe.trainer.objectives.registry import objective_of

ALPHA, WIDTH = 5.0, 64


def row(lengths: list[int], sample: int = 3, seed: int = 1) -> Record:
    places = sum(lengths)
    return Record(
        np.ones(places, np.int64),
        np.ones(places, np.int64),
        np.concatenate([np.arange(length) for length in lengths]),
        np.repeat(np.arange(len(lengths)), lengths),
        drawn=(seed, sample),
    )


def noise(*records: Record) -> torch.Tensor:
    return embedding_noise(noise_of(records, ALPHA), WIDTH)


def test_uniform_within_its_bounds_and_without_mean():
    for places in (1000, 250):
        values = noise(row([places]), row([places], sample=4)) * (places * WIDTH) ** 0.5 / ALPHA
        assert values.shape == (2, places, WIDTH) and values.dtype == torch.float32
        flat = values.flatten().double()
        assert -1 < float(flat.min()) < -0.999 and 0.999 < float(flat.max()) < 1
        error = 5 / len(flat) ** 0.5  # five standard errors, about
        assert abs(float(flat.mean())) < error and abs(float(flat.var()) - 1 / 3) < error
        shares = torch.histc(flat, 16, -1, 1) / len(flat)
        assert float((shares - 1 / 16).abs().max()) < error
        for axis in range(3):  # neighbours have nothing to do with each other
            near = (values * values.roll(1, axis)).mean()
            assert abs(float(near)) < error


def test_a_record_has_the_same_noise_wherever_the_row_ends_and_whatever_lies_beside_it():
    alone, padded, beside = noise(row([7])), noise(row([7]).padded(16)), noise(row([7, 5, 4]))
    assert torch.equal(padded[:, :7], alone) and torch.equal(beside[:, :7], alone)
    assert not padded[:, 7:].any()  # padding has none
    wide = embedding_noise(noise_of([row([7])], ALPHA), 2 * WIDTH)[..., :WIDTH] * 2**0.5
    torch.testing.assert_close(wide, alone)
    second = noise(row([7, 5, 4]))[0, 7:12]
    assert second.abs().max() > alone.abs().max() and not torch.equal(second, beside[0, :5])


def test_every_number_of_a_run_is_another():
    rows = [row([9, 9, 9], sample, seed) for sample in range(20) for seed in (1, 2)]
    values = noise(*rows).double().flatten()
    # 24 bits each: of n numbers n^2 / 2^25 pairs are the same by chance
    chance = len(values) ** 2 / 2**25
    assert len(values) - len(values.unique()) < chance + 5 * chance**0.5


def test_only_training_on_records_takes_it():
    record = row([5])
    noisy, plain = objective_of({"type": "sft", "neftune": 5}), objective_of("sft")
    assert noisy.collate([record]).noise is not None
    assert noisy.collate([replace(record, drawn=None)]).noise is None and plain.collate([record]).noise is None
    for wrong in (0, -1, True, "5", float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"objective.neftune .*: must be a number above 0"):
            objective_of({"type": "sft", "neftune": wrong})
    for other in ("dpo", "causal_lm"):
        with pytest.raises(UserError, match=f"objective {other}: unknown option 'neftune'"):
            objective_of({"type": other, "neftune": 5})
