"""Layouts in bfloat16 against one process in fp32, and with `grad_accum_dtype: fp32` against one rank.

Measured over 4 steps for GPT-2 and Llama on data 2, tensor 2, pipeline 2, sequence 2 and pipeline 2 x tensor 2: losses
within 2e-4, gradient norms within 4e-3, in bf16 and under torch_autocast alike, and no further than a single rank's.
Two micro batches summed in fp32 change none of that (losses of two ranks within 1.1e-4 of one rank's, norms within
1.4e-3, as with bf16 sums): what is left is the rounding of the forward pass, which another split orders differently.
What fp32 sums are for, many micro batches, is in test_grad_accum.py.
"""

from __future__ import annotations

import pytest

from tests.distributed import layouts, reference
from tests.distributed.reference import gpt2, llama
from tests.harness import run_ranks
from zeropipe.trainer.plan.layout import Layout

pytestmark = pytest.mark.distributed

BF16 = {"bf16": {"enabled": True}}
FP32_SUMS = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
PP2_TP2 = Layout(world=4, data=1, tensor=2, pipeline=2, zero_stage=1)
CASES = {
    "gpt2-pp2-tp2": (gpt2(), PP2_TP2, BF16),
    "llama-tp2-zero3": (llama(), Layout(world=2, data=1, tensor=2, zero_stage=3), BF16),
    "llama-sp2": (llama(), Layout(world=2, data=1, sequence=2, zero_stage=2), BF16),
    "llama-pp2-tp2-autocast": (llama(), PP2_TP2, AUTOCAST),
    "llama-zero1-fp32-sums": (llama(), Layout(world=2, data=2, zero_stage=1), FP32_SUMS),
    "gpt2-sp2-autocast": (gpt2(), Layout(world=2, data=1, sequence=2, zero_stage=1), AUTOCAST),
}


def _train(config: dict, layout: Layout, ds: dict):
    curve = layouts.train(config, layout, **ds)
    return curve.losses, curve.norms


@pytest.mark.parametrize("case", CASES)
def test_close_to_fp32(case):
    config, layout, ds = CASES[case]
    truth = reference.truth(config, layouts.STEPS)
    for losses, norms in run_ranks(layout.world, _train, config, layout, ds):
        assert losses == pytest.approx(truth.losses, rel=4e-4)
        assert norms == pytest.approx(truth.norms, rel=1e-2)
        assert losses != truth.losses, "this was not bfloat16"


ONE_RANK = Layout(world=1, data=1, zero_stage=1)
TWO_RANKS = {
    "zero2": Layout(world=2, data=2, zero_stage=2),
    "zero3": Layout(world=2, data=2, zero_stage=3),
    "tp2": Layout(world=2, data=1, tensor=2, zero_stage=1),
    "sp2": Layout(world=2, data=1, sequence=2, zero_stage=2),
}


@pytest.mark.parametrize(
    "config", [pytest.param(gpt2(), id="gpt2", marks=pytest.mark.slow), pytest.param(llama(), id="llama")]
)
def test_with_fp32_sums_close_to_one_rank(config):
    [(losses, norms)] = run_ranks(1, _train, config, ONE_RANK, FP32_SUMS)
    for name, layout in TWO_RANKS.items():
        for here, norms_here in run_ranks(2, _train, config, layout, FP32_SUMS):
            assert here == pytest.approx(losses, rel=2e-4), name
            assert norms_here == pytest.approx(norms, rel=3e-3), name
