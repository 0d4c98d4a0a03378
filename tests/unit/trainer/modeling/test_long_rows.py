"""What a forward and backward pass allocates over long rows, against the plan's count; MLPs that compute in tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.allocations import peak_bytes
from tests.tiny import GPT2, LLAMA, NO_DROPOUT
from zeropipe.trainer.families.registry import FAMILIES
from zeropipe.trainer.modeling.build import build_model
from zeropipe.trainer.modeling.causal import CausalLM
from zeropipe.trainer.modeling.tiles import tile_mlps
from zeropipe.trainer.plan.activations import activation_bytes
from zeropipe.trainer.ranks.ranks import Ranks
from zeropipe.trainer.recipe.precision import PRECISIONS

LONGEST = 8192
VOCAB, WIDTH = 96, 64  # a narrow head, so that the blocks are what counts
MODELS = {
    "gpt2": {**GPT2, **NO_DROPOUT, "n_positions": LONGEST},
    "llama": {**LLAMA, "max_position_embeddings": LONGEST},
}


def net_of(model: str, tile: int = 0, **changes: Any) -> CausalLM:
    config = {**MODELS[model], "vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, **changes}
    net = CausalLM(build_model(config, None, 5, torch.float32, Ranks()), VOCAB, Ranks(), uniform=True).train()
    if tile:
        tile_mlps(net.model, FAMILIES[model], tile)
    return net


def row(time: int) -> torch.Tensor:
    return torch.randint(1, VOCAB, (1, time), generator=torch.Generator().manual_seed(time))


def peak(net: CausalLM, time: int, documents: bool) -> int:
    lengths = (time // 2 - 100, 100, time // 4, time // 4)
    positions = torch.cat([torch.arange(length) for length in lengths])[None] if documents else None
    return peak_bytes(lambda: net(row(time), row(time), positions).sum().backward())


@pytest.mark.parametrize("tile", [0, 512])
@pytest.mark.parametrize(("model", "documents"), [("gpt2", True), ("llama", False), ("llama", True)])
def test_memory_is_linear_in_time_and_what_the_plan_says(model, documents, tile):
    net = net_of(model, tile)
    half, whole = (peak(net, time, documents) for time in (LONGEST // 2, LONGEST))
    assert 1.8 < whole / half < 2.05
    gradient = 4 * VOCAB * WIDTH  # of the head
    planned = activation_bytes(MODELS[model], PRECISIONS["fp32"], LONGEST, 2, mlp_tile=tile, padded_vocab=VOCAB)
    assert whole == pytest.approx(planned + gradient, rel=0.2)  # text by text, the output is there twice


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_tiles_change_nothing_but_the_order_of_sums(model, recomputes):
    """Losses and gradients; 7 tiles of which the last is shorter."""
    found = []
    for tile in (0, 15):
        net = net_of(model, tile)
        if recomputes:
            net.model.gradient_checkpointing_enable({"use_reentrant": False})
        losses = net(row(100).view(2, 50), row(100).view(2, 50))
        losses.sum().backward()
        found.append((losses.detach(), {name: p.grad for name, p in net.named_parameters()}))
    (whole, gradients), (tiled, tiled_gradients) = found
    torch.testing.assert_close(tiled, whole, rtol=1e-6, atol=1e-7)
    for name, gradient in gradients.items():
        torch.testing.assert_close(tiled_gradients[name], gradient, rtol=1e-5, atol=2e-6)


def test_dropout_inside_a_tile_is_drawn_again_as_it_was():
    """GPT-2's MLP ends in one: the loss's slope along a direction is the gradient only if both passes drop the same."""
    net = net_of("gpt2", 15, resid_pdrop=0.3).double()

    def loss() -> torch.Tensor:
        torch.manual_seed(1)
        return net(row(100), row(100)).double().sum()

    weight = net.model.transformer.h[0].mlp.c_fc.weight
    loss().backward()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)).double()
    slope = (weight.grad * direction).sum()
    with torch.no_grad():
        values = []
        for sign in (1, -2):
            weight += sign * 1e-4 * direction
            values.append(loss())
    assert float((values[0] - values[1]) / 2e-4) == pytest.approx(float(slope), rel=1e-2)
