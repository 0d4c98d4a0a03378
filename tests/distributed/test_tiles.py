"""MLPs computed some tokens at a time train as ever, whatever is split and whoever collects the gradients."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import layouts, reference
from tests.distributed.reference import assert_same, gpt2, llama
from tests.harness import run_ranks
from zeropipe.trainer.plan.layout import Layout

pytestmark = pytest.mark.distributed

MODELS = {"gpt2": gpt2(), "llama": llama()}
TILE = 5  # of the 32 tokens and more that a rank has
AGAIN = {"activation_checkpointing": {}}
OFFLOADED = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}


def _train(config: dict, layout: Layout, ds: dict[str, Any]) -> tuple[reference.Curve, int]:
    """And the most tokens that the activation of an MLP saw at once."""
    from torch.nn import GELU
    from transformers.activations import SiLUActivation

    most, whole = 0, layouts.recipe_for
    layouts.recipe_for = lambda *arguments: whole(*arguments).model_copy(update={"mlp_tile": TILE})
    for activation in (GELU, SiLUActivation):
        original = activation.forward

        def counting(self: Any, hidden: Any, original: Any = original) -> Any:
            nonlocal most
            most = max(most, hidden.numel() // hidden.shape[-1])
            return original(self, hidden)

        activation.forward = counting
    return layouts.train(config, layout, **ds), most


@pytest.mark.parametrize(
    ("model", "layout", "ds"),
    [
        ("llama", Layout(world=1, data=1, zero_stage=0), {}),
        ("gpt2", Layout(world=2, data=2, zero_stage=1), AGAIN),
        ("llama", Layout(world=2, data=2, zero_stage=2), AGAIN),
        ("llama", Layout(world=2, data=2, zero_stage=3), {}),
        ("gpt2", Layout(world=2, data=2, zero_stage=3), AGAIN),
        ("llama", Layout(world=2, data=2, zero_stage=3, offload_optimizer=True), OFFLOADED),
        ("llama", Layout(world=2, data=1, tensor=2, zero_stage=1), AGAIN),
        ("llama", Layout(world=2, data=1, sequence=2, zero_stage=3), AGAIN),
        ("gpt2", Layout(world=2, data=1, pipeline=2, zero_stage=1), AGAIN),
    ],
)
def test_tiled_mlps_follow_plain_pytorch(model, layout, ds):
    for curve, most in run_ranks(layout.world, _train, MODELS[model], layout, ds):
        assert_same(curve, reference.truth(MODELS[model], layouts.STEPS))
        assert most == TILE
