"""Weight gradients of embeddings and LayerNorms in half precision, against float64 on the same rounded numbers."""

import copy

import pytest
import torch
from torch import nn

from zeropipe.trainer.kernels.exact_sums import look_up, sum_exactly

ROUNDED_ONCE = {torch.bfloat16: 2**-8, torch.float16: 2**-10}  # twice the relative error of one rounding
TOKENS, WIDTH = 6000, 32


def gradients(module: nn.Module, inputs: torch.Tensor, slope: torch.Tensor) -> list[torch.Tensor]:
    """Of the module's parameters, and of its input where that has one."""
    inputs = inputs.clone().requires_grad_(inputs.is_floating_point())
    module(inputs).backward(slope)
    found = [p.grad for p in module.parameters()] + ([inputs.grad] if inputs.requires_grad else [])
    assert all(gradient is not None for gradient in found)
    return [gradient.double() for gradient in found]  # type: ignore[union-attr]


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def errors(module: nn.Module, inputs: torch.Tensor, slope: torch.Tensor) -> list[float]:
    truth = copy.deepcopy(module).double()
    doubled = inputs.double() if inputs.is_floating_point() else inputs
    pairs = zip(gradients(module, inputs, slope), gradients(truth, doubled, slope.double()), strict=True)
    return [error(*pair) for pair in pairs]


@pytest.fixture(params=ROUNDED_ONCE, ids=str)
def dtype(request):
    return request.param


def embedding(dtype: torch.dtype, **options) -> tuple[nn.Embedding, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(0, 5, (4, TOKENS // 4)) ** 2  # 0, 1, 4, 9, 16: over a thousand of each
    slope = (torch.randn(4, TOKENS // 4, WIDTH) + 1).to(dtype)
    return nn.Embedding(20, WIDTH, **options).to(dtype), ids, slope


def test_an_embedding_sums_in_fp32(dtype):
    module, ids, slope = embedding(dtype)
    [plain] = errors(copy.deepcopy(module), ids, slope)
    sum_exactly(module)
    [exact] = errors(module, ids, slope)
    assert exact < ROUNDED_ONCE[dtype]
    assert plain > 8 * exact, "torch sums exactly by now: this is no longer needed"


def test_the_row_of_padding_gets_no_gradient():
    module, ids, slope = embedding(torch.bfloat16, padding_idx=4)
    sum_exactly(module)
    [exact] = errors(module, ids, slope)
    assert exact < ROUNDED_ONCE[torch.bfloat16]
    assert module.weight.grad is not None
    assert not module.weight.grad[4].any()
    assert module.weight.grad[9].all()


def test_a_layer_norm_sums_in_fp32(dtype):
    torch.manual_seed(0)
    x, slope = (torch.randn(4, TOKENS // 4, WIDTH).to(dtype) for _ in range(2))
    module = nn.LayerNorm(WIDTH).to(dtype)
    with torch.no_grad():
        module.weight.normal_()
    plain = errors(copy.deepcopy(module), x, slope + 0.25)
    sum_exactly(module)
    weight, bias, inputs = errors(module, x, slope + 0.25)
    assert max(weight, bias) < ROUNDED_ONCE[dtype]
    assert inputs == plain[2], "the input's gradient is torch's own"
    if dtype == torch.bfloat16:
        assert plain[1] > 8 * bias, "torch sums exactly by now: this is no longer needed"


def test_what_is_frozen_is_left_out():
    module = nn.LayerNorm(WIDTH).bfloat16().requires_grad_(False)
    sum_exactly(module)
    x = torch.randn(8, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert module.weight.grad is None


def test_fp32_is_torchs_own():
    torch.manual_seed(0)
    module, weight = nn.LayerNorm(WIDTH), torch.randn(20, WIDTH)
    x, ids = torch.randn(8, WIDTH), torch.arange(8)
    before = module(x)
    sum_exactly(module)
    assert torch.equal(module(x), before)
    assert torch.equal(look_up(ids, weight), weight[:8])


def test_compiled_blocks_keep_them_whole():
    module = nn.Sequential(nn.LayerNorm(WIDTH), nn.Embedding(2, 3)).bfloat16()
    sum_exactly(module)
    x = torch.randn(8, WIDTH, dtype=torch.bfloat16)
    compiled = torch.compile(module[0], backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), module[0](x))
