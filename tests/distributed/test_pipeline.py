"""What a pipeline does besides following the loss: evaluation, logits, checkpointed activations, dropout."""

from __future__ import annotations

import contextlib
import io

import pytest

from tests.distributed import evaluation_checks, layouts, reference
from tests.distributed.reference import gpt2, llama
from tests.harness import run_ranks
from zeropipe.trainer.plan.layout import Layout

pytestmark = pytest.mark.distributed

PP2 = Layout(world=2, data=1, pipeline=2, zero_stage=1)
PP2_TP2 = Layout(world=4, data=1, pipeline=2, tensor=2, zero_stage=1)


@pytest.mark.parametrize(("config", "layout"), [(gpt2(), PP2), (llama(), PP2_TP2)], ids=["gpt2-pp2", "llama-pp2-tp2"])
def test_evaluation_and_logits_are_hugging_faces(config, layout):
    evaluation_checks.check(config, layout)


def _curve(config: dict, layout: Layout, partition: str, checkpointing: bool):
    ds = {"activation_checkpointing": {}, "pipeline": {"activation_checkpoint_interval": 1}} if checkpointing else {}
    curve = layouts.train(config, layout, partition, **ds)
    return curve.losses, curve.norms


def test_checkpointed_activations_change_nothing_with_dropout_on():
    config = gpt2(embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)
    once, again, checkpointed = (run_ranks(2, _curve, config, PP2, "uniform", on)[0] for on in (False, False, True))
    assert once == again == checkpointed
    without = reference.truth(gpt2(), layouts.STEPS)
    assert once[1][0] != pytest.approx(without.norms[0], rel=1e-3), "there was no dropout"


def _seen(config: dict, layout: Layout):
    """Which micro batches' masks each stage builds, and how often."""
    engine = layouts.start(config, layout)
    builder = engine.module._layer_specs[0].module_args[0]
    built, build = [], builder.outline.run
    builder.outline.run = lambda hidden, positions, *rest: (
        built.append(positions.tolist()) or build(hidden, positions, *rest)
    )
    engine.train_step(layouts.Stream(config, engine.ranks, 2), 0)
    return built


def test_masks_are_built_once_per_stage_and_micro_batch():
    config = llama(num_hidden_layers=4)
    expected = [reference.micro_batch(config, 0, 0, 1, micro, 2)[2].tolist() for micro in range(2)]
    assert run_ranks(2, _seen, config, PP2) == [expected, expected]


def _measured(config: dict):
    engine = layouts.start(config, PP2, "measured")
    stream, losses, printed = layouts.Stream(config, engine.ranks, 2), [], io.StringIO()
    with contextlib.redirect_stdout(printed):
        for step in range(3):
            losses.append(engine.train_step(stream, step).loss)
    return engine.module.bounds, engine.predicted_seconds, losses, printed.getvalue()


def test_the_measured_partition_counts_the_head():
    """Eight thin blocks and a head of 40,000 words: the head alone outweighs the blocks."""
    config = gpt2(n_layer=8, vocab_size=40_000)
    truth = reference.truth(config, 3)
    (bounds, predicted, losses, printed), (other, _, _, silent) = run_ranks(2, _measured, config)
    assert bounds == other
    assert bounds[1] > 6, f"layers of the first stage: {bounds}"
    assert predicted > 0
    assert losses == pytest.approx(truth.losses, rel=1e-6)
    assert "predicted to take" in printed and not silent


def _in_chunks(config: dict, layout: Layout):
    from zeropipe.trainer.modeling import cross_entropy

    cross_entropy.CHUNK_BYTES = 10 * 4 * 512  # ten tokens of 384 or 512 columns
    return layouts.train(config, layout)


@pytest.mark.parametrize("layout", [PP2, PP2_TP2], ids=["pp2", "pp2-tp2"])
def test_the_head_in_chunks_trains_the_same(layout):
    truth = reference.truth(gpt2(), layouts.STEPS)
    for curve in run_ranks(layout.world, _in_chunks, gpt2(), layout):
        reference.assert_same(curve, truth)
