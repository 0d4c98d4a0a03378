"""Tensor parallelism through DeepSpeed on every ZeRO stage, against one process of Hugging Face."""

from __future__ import annotations

import pytest

from tests.distributed import layouts, reference
from tests.distributed.reference import assert_same, gpt2, llama
from tests.harness import run_ranks
from zeropipe.trainer.plan.layout import Layout

pytestmark = pytest.mark.distributed

MODELS = {"gpt2": gpt2(), "llama": llama(), "llama-one-kv-head": llama(num_key_value_heads=1)}


@pytest.mark.parametrize(
    ("model", "stage"),
    [
        pytest.param(model, stage, marks=() if stage in fast else pytest.mark.slow)
        for model, fast in (("gpt2", (1, 3)), ("llama", ()), ("llama-one-kv-head", (0, 2, 3)))
        for stage in range(4)
    ],
)
def test_tensor_2(model, stage):
    curves = run_ranks(2, layouts.train, MODELS[model], Layout(world=2, data=1, tensor=2, zero_stage=stage))
    for curve in curves:
        assert_same(curve, reference.truth(MODELS[model], layouts.STEPS))


@pytest.mark.parametrize(
    ("model", "stage"),
    [
        ("gpt2", 1),
        ("llama", 3),
        pytest.param("gpt2", 3, marks=pytest.mark.slow),
        pytest.param("llama", 1, marks=pytest.mark.slow),
    ],
)
def test_tensor_2_data_2(model, stage):
    curves = run_ranks(4, layouts.train, MODELS[model], Layout(world=4, data=2, tensor=2, zero_stage=stage))
    for curve in curves:
        assert_same(curve, reference.truth(MODELS[model], layouts.STEPS))
