"""What a pipeline does besides following the loss: evaluation, logits, checkpointed activations, dropout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.distributed import layouts, reference
from tests.distributed.reference import TIME, batch, gpt2, llama
from tests.harness import run_ranks
from zeropipe.trainer.data import Batch
from zeropipe.trainer.layout import Layout

pytestmark = pytest.mark.distributed

PP2 = Layout(world=2, data=1, pipeline=2, zero_stage=1)
PP2_TP2 = Layout(world=4, data=1, pipeline=2, tensor=2, zero_stage=1)


def _look(config: dict, layout: Layout):
    """Evaluates two micro batches, asks for logits of two lengths, and trains one step afterwards."""
    engine = layouts.start(config, layout)
    micro_batches = [Batch(*(tensor[half] for tensor in batch(9))) for half in (slice(0, 4), slice(4, 8))]
    loss, tokens = engine.eval_loss(micro_batches)
    ids = batch(9)[0][:2]
    logits = engine.logits(ids), engine.logits(ids[:, :5])
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % reference.VOCAB
    other = engine.logits(changed)
    after = engine.train_step(layouts.Stream(config, engine.ranks, 2), 0)
    return loss, tokens, [part.numpy().copy() for part in (*logits, other)], (after.loss, after.grad_norm, after.tokens)


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


@pytest.mark.parametrize("layout", [PP2, PP2_TP2], ids=["pp2", "pp2-tp2"])
@pytest.mark.parametrize("config", [gpt2(), llama()], ids=["gpt2", "llama"])
def test_evaluation_and_logits_are_hugging_faces(config, layout):
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


def _curve(config: dict, layout: Layout, partition: str, checkpointing: bool):
    ds = {"activation_checkpointing": {}} if checkpointing else {}
    curve = layouts.train(config, layout, partition, **ds)
    return curve.losses, curve.norms


def test_checkpointed_activations_change_nothing_with_dropout_on():
    config = gpt2(embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)
    once, again, checkpointed = (run_ranks(2, _curve, config, PP2, "uniform", on)[0] for on in (False, False, True))
    assert once == again == checkpointed
    [without] = run_ranks(1, reference.train, gpt2(), layouts.STEPS)
    assert once[0][0] != pytest.approx(without.losses[0], rel=1e-4), "there was no dropout"


def _seen(config: dict, layout: Layout):
    """Which micro batches' masks each stage builds, and how often."""
    engine = layouts.start(config, layout)
    builder = engine.module._layer_specs[0].module_args[0]
    built, build = [], builder._attention_inputs
    builder._attention_inputs = lambda hidden, positions: built.append(positions.tolist()) or build(hidden, positions)
    engine.train_step(layouts.Stream(config, engine.ranks, 2), 0)
    return built


def test_masks_are_built_once_per_stage_and_micro_batch():
    config = llama(num_hidden_layers=4)
    expected = [reference.micro_batch(config, 0, 0, 1, micro, 2)[2].tolist() for micro in range(2)]
    assert run_ranks(2, _seen, config, PP2) == [expected, expected]
