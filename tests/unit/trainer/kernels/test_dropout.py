"""Dropout's masks: their share, their scale, and that the backward pass sees the same ones."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

from zeropipe.trainer.kernels.dropout import Dropout, Masks, dropout
from zeropipe.trainer.kernels.swap import use_kernels

from ....tiny import GPT2


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_and_the_mean_are_dropouts(p: float):
    torch.manual_seed(0)
    dropped = dropout(torch.ones(1000, 1000), p)
    assert (dropped == 0).float().mean().item() == pytest.approx(p, abs=3e-3)
    assert dropped.mean().item() == pytest.approx(1, abs=6e-3)
    assert len(dropped.unique()) == 2


def test_neighbours_rows_and_parts_are_independent():
    masks = Masks(0.5, 7)
    one, other = (masks.zeroed((1000, 1003), part).float() - 0.5 for part in (0, 1))
    for a, b in ((one[:, 1:], one[:, :-1]), (one[1:], one[:-1]), (one, other)):
        assert abs(4 * (a * b).mean().item()) < 5e-3  # five standard deviations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_has_the_mask_of_the_output(dtype: torch.dtype):
    x = torch.randn(33, 65, dtype=dtype, requires_grad=True)
    output = dropout(x, 0.3)
    output.backward(torch.ones_like(output))
    assert x.grad is not None
    assert torch.equal(x.grad != 0, output != 0)
    torch.testing.assert_close(output, x.detach() * x.grad)


def test_it_follows_torchs_generator_and_rests_in_evaluation():
    module, x = Dropout(0.4), torch.randn(50, 50)

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return module(x)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert torch.equal(module.eval()(x), x)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_all_and_nothing_are_torchs(p: float):
    x = torch.randn(5, 5)
    assert torch.equal(dropout(x, p), nn.functional.dropout(x, p))


def test_swapped_modules_compute_the_same():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**GPT2, vocab_size=100)).eval()
    ids = torch.arange(32)[None] % 100
    before = model(ids).logits
    names = {name for name, _ in model.named_parameters()}
    use_kernels(model)
    kinds = {type(module) for module in model.modules()}
    assert Dropout in kinds
    assert nn.GELU in kinds
    assert nn.Dropout not in kinds
    assert {name for name, _ in model.named_parameters()} == names
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast"])
def test_both_chains_are_the_approximation_by_tanh(name: str):
    x = torch.linspace(-8, 8, 10001, dtype=torch.float64)
    swapped = nn.Sequential(ACT2FN[name])
    use_kernels(swapped)
    torch.testing.assert_close(swapped(x), ACT2FN[name](x), rtol=1e-9, atol=1e-9)
