"""Causal attention with dropout against plain arithmetic with the same mask."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zeropipe.trainer.kernels.attention import causal_attention

TIMES = [1, 100, 128, 300]


def kept(query: Tensor, key: Tensor, p: float, seed: int) -> Tensor:
    """What dropout leaves of the probabilities [rows, heads, time, time]: read off, with the identity as values."""
    time = query.shape[2]
    torch.manual_seed(seed)
    return causal_attention(query, key, torch.eye(time, dtype=query.dtype).expand(*query.shape[:2], time, time), p)


def plain(query: Tensor, key: Tensor, value: Tensor, factor: Tensor) -> Tensor:
    time = query.shape[2]
    scores = (query @ key.mT) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(torch.ones(time, time, dtype=torch.bool).triu(1), -math.inf)
    return (scores.softmax(-1) * factor) @ value


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_output_and_gradients(time: int, dtype: torch.dtype, bound: float):
    torch.manual_seed(1)
    tensors = [torch.randn(2, 3, time, 16, dtype=dtype, requires_grad=True) for _ in range(3)]
    given = torch.randn(2, 3, time, 16, dtype=dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    chances = plain(exact[0], exact[1], torch.eye(time, dtype=torch.float64), torch.ones(()).double()).detach()
    left = kept(tensors[0].detach(), tensors[1].detach(), 0.25, seed=5).double()
    factor = torch.where(left != 0, 4 / 3, 0.0).double()
    torch.testing.assert_close(left, chances * factor, rtol=bound, atol=bound / 10)

    torch.manual_seed(5)
    output = causal_attention(*tensors, 0.25)
    output.backward(given)
    reference = plain(*exact, factor)
    reference.backward(given.double())
    for ours, theirs in zip([output, *(t.grad for t in tensors)], [reference, *(t.grad for t in exact)], strict=True):
        assert ours is not None
        assert theirs is not None
        assert (ours.double() - theirs).abs().max() <= bound * theirs.abs().max().clamp(min=1)


def test_the_share_that_is_dropped():
    query, key = torch.randn(2, 2, 4, 300, 8)
    left = kept(query, key, 0.1, seed=3)
    seen = torch.ones(300, 300, dtype=torch.bool).tril()
    assert (left[..., seen] == 0).float().mean().item() == pytest.approx(0.1, abs=2e-3)
    assert not left[..., ~seen].any()
    assert not torch.equal(left[0, 0] == 0, left[0, 1] == 0), "every head has a mask of its own"


def test_its_memory_grows_with_the_sequence_and_not_with_its_square():
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        causal_attention(*(torch.randn(1, 2, 1024, 8, requires_grad=True) for _ in range(3)), 0.1)
    assert sum(saved) == 2 * 1024 * (4 * 8 + 1)


def test_under_autocast_it_computes_in_bfloat16():
    tensors = [torch.randn(1, 2, 64, 8, requires_grad=True) for _ in range(3)]
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        output = causal_attention(*tensors, 0.2)
    torch.manual_seed(2)
    by_hand = causal_attention(*(tensor.bfloat16() for tensor in tensors), 0.2)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, by_hand)
    output.sum().backward()
    assert F.l1_loss(tensors[0].grad, tensors[0].grad.bfloat16().float()) < 1e-6  # type: ignore[union-attr]
