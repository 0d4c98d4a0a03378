"""Sequence parallelism on every ZeRO stage, against one process of Hugging Face."""

from __future__ import annotations

import pytest

from tests.distributed import layouts, reference
from tests.distributed.reference import assert_same, gpt2, llama
from tests.harness import run_ranks
from zeropipe.trainer.plan.layout import Layout

pytestmark = pytest.mark.distributed

MODELS = {"gpt2": gpt2(), "llama": llama(), "llama-one-kv-head": llama(num_key_value_heads=1)}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("model", [pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
def test_sequence_2(model, stage):
    layout = Layout(world=2, data=1, sequence=2, zero_stage=stage)
    for curve in run_ranks(2, layouts.train, MODELS[model], layout, timeout=60):
        assert_same(curve, reference.truth(MODELS[model], layouts.STEPS))


CASES = {
    "fewer-kv-heads-than-ranks": ("llama-one-kv-head", Layout(world=2, data=1, sequence=2, zero_stage=1)),
    "sp4": ("llama", Layout(world=4, data=1, sequence=4, zero_stage=2)),
    "sp2-dp2": ("gpt2", Layout(world=4, data=2, sequence=2, zero_stage=3)),
    "sp2-tp2": ("llama", Layout(world=4, data=1, sequence=2, tensor=2, zero_stage=1)),
    "gpt2-sp2-tp2": ("gpt2", Layout(world=4, data=1, sequence=2, tensor=2, zero_stage=3)),
}


@pytest.mark.parametrize("case", CASES)
def test_cases(case):
    model, layout = CASES[case]
    for curve in run_ranks(layout.world, layouts.train, MODELS[model], layout, timeout=60):
        assert_same(curve, reference.truth(MODELS[model], layouts.STEPS))
