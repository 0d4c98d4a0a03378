"""Rows of records against the raw files; and packed against unpacked, in loss and gradient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import EOD, GPT2, LLAMA, NO_DROPOUT, VOCAB, tiny_recipe, tiny_records
from zeropipe.data_prep.errors import UserError
from zeropipe.data_prep.store import BEGINS, TRAINED
from zeropipe.trainer.data.batches import Batch, BatchShape, evaluation_batches
from zeropipe.trainer.data.labels import IGNORE
from zeropipe.trainer.data.samples import Packs, open_samples
from zeropipe.trainer.modeling.build import build_model
from zeropipe.trainer.modeling.causal import CausalLM
from zeropipe.trainer.objectives.registry import objective_of
from zeropipe.trainer.ranks.ranks import Ranks
from zeropipe.trainer.recipe.recipe import Recipe

SEQ = 64


def raw_records(store: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and flags of every record, read from the files alone."""
    names = [shard["name"] for shard in json.loads((store / "manifest.json").read_text())["shards"]]
    found = []
    for name in names:
        tokens, flags = np.fromfile(store / f"{name}.bin", np.uint16), np.fromfile(store / f"{name}.mask", np.uint8)
        sizes = np.fromfile(store / f"{name}.idx", np.int32, offset=34, count=_sequences(store / f"{name}.idx"))
        cuts = np.cumsum(sizes)[:-1]
        found += list(zip(np.split(tokens.astype(np.int64), cuts), np.split(flags, cuts), strict=True))
    return found


def _sequences(idx: Path) -> int:
    return int(np.fromfile(idx, np.uint64, offset=18, count=1)[0])


def packs_of(store: Path, **data: Any) -> Packs:
    mapping = tiny_recipe(store, store / "run", data={"split": "1", "seq_len": SEQ, **data})
    (packs,) = open_samples(Recipe.model_validate(mapping), "train")
    assert isinstance(packs, Packs)
    return packs


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_rows_hold_the_records_as_they_are_in_the_files(tmp_path, kind, packing):
    store = tiny_records(tmp_path / "store", kind)
    packs, raw = packs_of(store, packing=packing), raw_records(store)
    assert len(list(store.glob("*.mask"))) > 1
    seen = []
    for row in range(len(packs)):
        record = packs.record(row)
        inputs, labels, positions = [], [], []
        for number in packs.rows[row]:
            seen.append(int(number))
            tokens, flags = raw[number]
            for text in np.split(np.arange(len(tokens)), np.flatnonzero(flags & BEGINS)[1:]):
                inputs += tokens[text][:-1].tolist()
                labels += [t if f & TRAINED else IGNORE for t, f in zip(tokens[text][1:], flags[text][1:], strict=True)]
                positions += range(len(text) - 1)
        assert record.inputs.tolist() == inputs and record.labels.tolist() == labels
        if packing == "none" and kind == "sft":
            assert record.positions is None
        else:
            assert record.positions is not None and record.positions.tolist() == positions
        assert len(inputs) <= SEQ
    assert sorted(seen) == list(range(len(raw)))
    assert (len(packs) < len(raw)) == (packing == "best_fit")


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("model", [{**GPT2, **NO_DROPOUT}, LLAMA], ids=["gpt2", "llama"])
def test_packed_equals_unpacked_in_loss_and_gradient(tmp_path, kind, model):
    store = tiny_records(tmp_path / "store", kind, records=40)
    config = {**model, "vocab_size": VOCAB, "bos_token_id": EOD, "eos_token_id": EOD}
    net = CausalLM(build_model(config, None, 5, torch.float32, Ranks()), VOCAB, Ranks())
    objective = objective_of(kind)

    def loss_and_gradients(packing: str) -> tuple[float, dict[str, torch.Tensor]]:
        packs = packs_of(store, packing=packing)
        shape = BatchShape(4, 1, 4, SEQ, VOCAB, 8, objective.collate)
        batches: list[Batch] = list(evaluation_batches([packs], shape, Ranks()))
        weight = sum(objective.weight(batch) for batch in batches)
        net.zero_grad()
        total = 0.0
        for batch in batches:
            losses = net(batch.input_ids, batch.labels, batch.position_ids)
            loss = objective.loss(batch, losses).sum / weight
            loss.backward()
            total += loss.item()
        return total, {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

    packed, packed_gradients = loss_and_gradients("best_fit")
    alone, alone_gradients = loss_and_gradients("none")
    assert packed == pytest.approx(alone, rel=1e-6)
    for name, gradient in alone_gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_record_that_is_too_long_is_refused(tmp_path):
    store = tiny_records(tmp_path / "store")
    longest = max(len(tokens) for tokens, _ in raw_records(store)) - 1
    assert len(packs_of(store, seq_len=longest)) > 0
    with pytest.raises(UserError, match=rf"1? of 120 records do not fit into data.seq_len {longest - 1}: the longest"):
        len(packs_of(store, seq_len=longest - 1))


def test_a_row_beyond_the_end_of_an_evaluation_carries_no_loss(tmp_path):
    for kind in ("sft", "dpo"):
        packs = packs_of(tiny_records(tmp_path / kind, kind, records=5), packing="none")
        objective = objective_of(kind)
        shape = BatchShape(4, 1, 4, SEQ, VOCAB, 8, objective.collate)
        first, second = evaluation_batches([packs], shape, Ranks())
        assert objective.weight(second) == (1 if kind == "dpo" else second.tokens)
        assert (second.labels[1:] == IGNORE).all() and objective.weight(first) >= 4
