"""Windows, micro batches and packed documents, against the raw token files and against training documents alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import EOD, GPT2, LLAMA, NO_DROPOUT, VOCAB, tiny_recipe, tiny_store
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.data.batches import BatchShape, BatchStream, SplitRows, evaluation_batches, make_batch
from zeropipe.trainer.data.labels import IGNORE
from zeropipe.trainer.data.samples import Windows, open_samples, sample_order
from zeropipe.trainer.modeling.build import build_model
from zeropipe.trainer.modeling.causal import CausalLM
from zeropipe.trainer.ranks.ranks import Ranks
from zeropipe.trainer.recipe.recipe import Recipe

SEQ = 48
SHAPE = BatchShape(4, 1, 4, SEQ, VOCAB)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tiny_store(tmp_path_factory.mktemp("data") / "store", documents=120)


@pytest.fixture(scope="module")
def stream(store) -> np.ndarray:
    return np.concatenate([np.fromfile(file, np.uint16) for file in sorted(store.glob("*.bin"))]).astype(np.int64)


def recipe(store: Path, **data) -> Recipe:
    mapping = tiny_recipe(store, store / "run", data={"split": "80,15,5", "seq_len": SEQ, **data})
    return Recipe.model_validate(mapping)


def test_splits_are_whole_documents_and_cover_the_store_once(store, stream):
    ends = np.flatnonzero(stream == EOD) + 1
    bounds = [0, ends[95], ends[113], ends[119]]  # 80, 15 and 5 % of 120 documents
    for split, start, stop in zip(("train", "valid", "test"), bounds, bounds[1:], strict=False):
        (windows,) = open_samples(recipe(store), split)
        assert (windows.part.start, windows.part.stop) == (start, stop)
        assert len(windows) == (stop - start - 1) // SEQ
        for sample in (0, len(windows) - 1):
            first = start + sample * SEQ
            assert windows.tokens(sample).tolist() == stream[first : first + SEQ + 1].tolist()


def test_a_batch_predicts_the_next_token_everywhere(store, stream):
    windows = open_samples(recipe(store), "train")
    batch = make_batch([(windows[0], 2), (windows[0], None), (windows[0], 0)], SHAPE)
    assert batch.input_ids[0].tolist() == stream[2 * SEQ : 3 * SEQ].tolist()
    assert batch.labels[0].tolist() == stream[2 * SEQ + 1 : 3 * SEQ + 1].tolist()
    assert (batch.labels[1] == IGNORE).all() and batch.tokens == 2 * SEQ
    assert batch.position_ids is None


def test_every_sample_once_an_epoch_whatever_the_ranks(store):
    windows = open_samples(recipe(store), "train")
    order = sample_order(recipe(store), windows)
    steps = len(windows[0]) // 8

    def consumed(world: int, micro: int) -> list[list[list[int]]]:
        shape = BatchShape(micro, 8 // micro // world, 8, SEQ, VOCAB)
        streams = [BatchStream(windows, order, shape, Ranks(rank=r, data=r, data_size=world)) for r in range(world)]
        taken = []
        for _ in range(steps):
            parts = [stream.next_step() for stream in streams]
            rows = [
                row.tolist() for part in parts for micro_batch in part.micro_batches for row in micro_batch.input_ids
            ]
            taken.append(sorted(rows))
        for stream in streams:
            stream.close()
        return taken

    one = consumed(1, 8)
    assert one == consumed(2, 2) == consumed(4, 1) == consumed(2, 4)
    expected = [windows[0].tokens(sample)[:-1].tolist() for sample in range(len(windows[0]))]
    seen = [row for step in one for row in step]
    assert len(seen) == steps * 8 and all(row in expected for row in seen)
    assert len({tuple(row) for row in seen}) == len({tuple(row) for row in expected}) or len(seen) < len(expected)


def test_a_stream_goes_on_from_any_place(store):
    windows = open_samples(recipe(store), "train")
    order, shape = sample_order(recipe(store), windows), BatchShape(4, 1, 4, SEQ, VOCAB)
    whole, part = (BatchStream(windows, order, shape, Ranks()) for _ in range(2))
    steps = [whole.next_step() for _ in range(5)]
    part.next_step()
    part.samples_consumed = 12
    again = part.next_step()
    assert (again.first, again.stop, again.ledger) == (12, 16, steps[3].ledger)
    assert torch.equal(again.micro_batches[0].input_ids, steps[3].micro_batches[0].input_ids)
    whole.close()
    part.close()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_covers_a_split_once(store, world):
    windows = open_samples(recipe(store), "valid")
    shape = BatchShape(2, 2, 4 * world, SEQ, VOCAB)
    rows, counts = [], set()
    for rank in range(world):
        batches = list(evaluation_batches(windows, shape, Ranks(rank=rank, data=rank, data_size=world)))
        counts.add(len(batches))
        rows += [row.tolist() for b in batches for row, y in zip(b.input_ids, b.labels, strict=True) if y[0] != IGNORE]
    expected = [windows[0].tokens(sample)[:-1].tolist() for sample in range(len(windows[0]))]
    assert sorted(rows) == sorted(expected) and len(counts) == 1


class Counted:
    """Samples that only say how many they are."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


def test_a_split_of_billions_is_not_listed():
    parts = [Counted(3), Counted(0), Counted(4_000_000_000), Counted(2)]
    rows = SplitRows(parts)  # type: ignore[arg-type]
    assert len(rows) == 4_000_000_005
    ends = (0, 2, 3, 4_000_000_002, 4_000_000_003, 4_000_000_004)
    assert [(parts.index(part), number) for part, number in map(rows.__getitem__, ends)] == [
        (0, 0), (0, 2), (2, 0), (2, 3_999_999_999), (3, 0), (3, 1)
    ]  # fmt: skip
    with pytest.raises(IndexError):
        rows[4_000_000_005]
    assert len(SplitRows(parts, 7)) == 7  # type: ignore[arg-type]
    assert len(SplitRows([], 7)) == 0


@pytest.mark.parametrize("model", [{**GPT2, **NO_DROPOUT}, LLAMA], ids=["gpt2", "llama"])
def test_packed_documents_train_as_each_alone(store, model):
    """Logits and gradients of one packed batch equal those of its documents, each in a batch of its own."""
    windows = open_samples(recipe(store, document_mask=True), "train")[0]
    config = {**model, "vocab_size": VOCAB, "bos_token_id": EOD, "eos_token_id": EOD}
    net = CausalLM(build_model(config, None, 5, torch.float32, Ranks()), VOCAB, Ranks()).double()
    samples = [(windows, n) for n in range(4)]
    packed = make_batch(samples, SHAPE)
    logits = net(packed.input_ids, None, packed.position_ids)
    net(packed.input_ids, packed.labels, packed.position_ids).sum().backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    boundaries = 0
    for row, (_, sample) in enumerate(samples):
        tokens = torch.from_numpy(windows.tokens(sample))
        starts = [0, *(s for s in windows.document_starts(sample).tolist() if 0 < s < SEQ), SEQ]
        boundaries += len(starts) - 2
        for begin, end in pairwise(starts):
            alone = tokens[begin:end][None]
            # logits leave the model in fp32
            torch.testing.assert_close(net(alone)[0], logits[row, begin:end], rtol=1e-5, atol=1e-6)
            # a document's last token predicts nothing; a window's last one predicts the token behind the window
            inside = end == SEQ and SEQ not in windows.document_starts(sample)
            targets = torch.cat([alone[0, 1:], tokens[SEQ:] if inside else torch.tensor([IGNORE])])
            net(alone, targets[None]).sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)
    assert boundaries >= 4  # or the test says nothing
    plain = make_batch([(replace(windows, document_mask=False), n) for _, n in samples], SHAPE)
    assert not torch.allclose(net(plain.input_ids), logits, atol=1e-4)  # without the mask documents see each other


def test_windows_read_across_shards(store):
    assert len(list(store.glob("*.bin"))) > 1, "the store must have several shards for these tests to mean much"


def test_the_order_depends_on_the_data(store):
    (windows,) = open_samples(recipe(store), "train")
    shorter = replace(windows, seq_len=SEQ // 2)
    assert windows.fingerprint != shorter.fingerprint


def test_a_negative_token_is_named(store, monkeypatch):
    windows = open_samples(recipe(store), "train")
    monkeypatch.setattr(Windows, "tokens", lambda self, sample: np.array([*range(SEQ), -3]))
    with pytest.raises(UserError, match=r"sample 0 holds token -3, but the model's vocabulary has 500"):
        make_batch([(windows[0], 0)], SHAPE)


def test_a_token_beyond_the_vocabulary_is_named(store):
    windows = open_samples(recipe(store), "train")
    with pytest.raises(UserError, match=r"store: sample 0 holds token \d+, but the model's vocabulary has 40;"):
        make_batch([(windows[0], 0)], replace(SHAPE, vocab_size=40))
