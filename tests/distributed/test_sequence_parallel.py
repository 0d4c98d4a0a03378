"""Sequence parallelism besides following the loss: evaluation, logits, dropout, and defects that must show."""

from __future__ import annotations

import pytest

from tests.distributed import evaluation_checks, layouts, reference
from tests.distributed.reference import assert_same, gpt2, llama
from tests.harness import run_ranks
from zeropipe.trainer.plan.layout import Layout
from zeropipe.trainer.ranks.ranks import Ranks

pytestmark = pytest.mark.distributed

SP2 = Layout(world=2, data=1, sequence=2, zero_stage=2)


@pytest.mark.parametrize("config", [gpt2(), llama()], ids=["gpt2", "llama"])
def test_evaluation_and_logits_are_hugging_faces(config):
    evaluation_checks.check(config, SP2)


def test_tensor_parallel_evaluation_and_logits_are_hugging_faces():
    evaluation_checks.check(gpt2(), Layout(world=4, data=2, tensor=2, zero_stage=3))


def _dropout(config: dict):
    curve = layouts.train(config, SP2)
    return curve.losses, curve.norms


def test_dropout_is_repeatable_and_there():
    config = gpt2(embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)
    once, again = run_ranks(2, _dropout, config), run_ranks(2, _dropout, config)
    assert once == again
    without = reference.truth(gpt2(), layouts.STEPS)
    assert once[0][1][0] != pytest.approx(without.norms[0], rel=1e-3)


def _scaled_by_data_ranks_alone(config: dict, layout: Layout):
    Ranks.replicas = property(lambda self: self.data_size)  # type: ignore[method-assign, assignment]
    return layouts.train(config, layout)


def test_gradients_scaled_by_the_wrong_ranks_show_in_the_norm():
    truth = reference.truth(llama(), layouts.STEPS)
    curve, _ = run_ranks(2, _scaled_by_data_ranks_alone, llama(), SP2)
    with pytest.raises(AssertionError, match="step 0: gradient norm"):
        assert_same(curve, truth)
