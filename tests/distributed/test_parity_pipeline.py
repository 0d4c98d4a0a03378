"""Pipelines, alone and with tensor and data parallelism, against one process of Hugging Face."""

from __future__ import annotations

import pytest

from tests.distributed import layouts, reference
from tests.distributed.reference import assert_same, gpt2, llama
from tests.harness import run_ranks
from zeropipe.trainer.plan.layout import Layout

pytestmark = pytest.mark.distributed

MODELS = {
    "gpt2": gpt2(n_layer=3),
    "gpt2-untied": gpt2(tie_word_embeddings=False),
    "llama": llama(),
    "llama-tied": llama(tie_word_embeddings=True, num_key_value_heads=1, num_hidden_layers=3),
}
LAYOUTS = {
    "pp2": Layout(world=2, data=1, pipeline=2, zero_stage=1),
    "pp2-zero0": Layout(world=2, data=1, pipeline=2, zero_stage=0),
    "pp2-dp2": Layout(world=4, data=2, pipeline=2, zero_stage=1),
    "pp2-tp2": Layout(world=4, data=1, tensor=2, pipeline=2, zero_stage=1),
    "pp3": Layout(world=3, data=1, pipeline=3, zero_stage=1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", ["gpt2", pytest.param("llama-tied", marks=pytest.mark.slow)])
def test_tied(model, layout):
    for curve in run_ranks(LAYOUTS[layout].world, layouts.train, MODELS[model], LAYOUTS[layout], timeout=60):
        assert_same(curve, reference.truth(MODELS[model], layouts.STEPS))


@pytest.mark.parametrize("layout", ["pp2", "pp2-tp2"])
@pytest.mark.parametrize("model", ["gpt2-untied", "llama"])
def test_untied(model, layout):
    for curve in run_ranks(LAYOUTS[layout].world, layouts.train, MODELS[model], LAYOUTS[layout], timeout=60):
        assert_same(curve, reference.truth(MODELS[model], layouts.STEPS))
