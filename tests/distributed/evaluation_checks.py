"""What an engine answers besides training: evaluation and logits, against Hugging Face in one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.distributed import layouts, reference
from tests.distributed.reference import TIME, batch
from tests.harness import run_ranks
from zeropipe.trainer.data.batches import Batch
from zeropipe.trainer.plan.layout import Layout


def check(config: dict, layout: Layout) -> None:
    [(loss, tokens, plain, (first_loss, first_norm))] = run_ranks(1, _truth, config)
    for found_loss, found_tokens, (whole, short, other), after in run_ranks(layout.world, _look, config, layout):
        assert found_loss == pytest.approx(loss, rel=1e-6) and found_tokens == tokens
        assert whole.shape == (2, TIME, reference.VOCAB)
        np.testing.assert_allclose(whole, plain, atol=2e-5)
        np.testing.assert_allclose(short, plain[:, :5], atol=2e-5)
        assert np.array_equal(whole[:, :-1], other[:, :-1]), "the last token changed an earlier logit"
        assert not np.array_equal(whole[:, -1], other[:, -1])
        assert after[0] == pytest.approx(first_loss, rel=1e-6), "evaluation left something behind"
        assert after[1] == pytest.approx(first_norm, rel=1e-5)


def _look(config: dict, layout: Layout):
    """Evaluates two micro batches of every data-parallel rank, asks for logits of two lengths, then trains one step."""
    engine = layouts.start(config, layout)
    micro_batches = [
        Batch(*reference.micro_batch(config, 9, engine.ranks.data, engine.ranks.data_size, micro, 2))
        for micro in range(2)
    ]
    found = engine.evaluate(micro_batches)
    loss, tokens = found.loss, found.tokens
    ids = batch(9)[0][:2]
    logits = engine.logits(ids), engine.logits(ids[:, :5])
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % reference.VOCAB
    other = engine.logits(changed)
    after = engine.train_step(layouts.Stream(config, engine.ranks, 2), 0)
    return loss, tokens, [part.numpy().copy() for part in (*logits, other)], (after.loss, after.grad_norm)


def _truth(config: dict):
    model = reference.hugging_face(config).eval()
    ids, labels, positions = batch(9)
    with torch.no_grad():
        # with a cache Hugging Face looks for no document boundaries
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        plain = model(input_ids=ids[:2], use_cache=False).logits
    first = reference.train(config, 1)
    return loss, int((labels != -100).sum()), plain.numpy().copy(), (first.losses[0], first.norms[0])
