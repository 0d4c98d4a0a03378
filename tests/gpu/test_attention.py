"""Attention over rows of several texts on CUDA: against its definition, without a mask, and without waiting for it."""

from __future__ import annotations

import pytest
import torch

from tests.unit.trainer.modeling.test_attention import POSITIONS, dense
from zeropipe.trainer.modeling.attention import _has_kernel, attention_by_text, text_lengths

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

DEVICE = "cuda"
HEAD = 64


@pytest.fixture(autouse=True)
def device():
    if not torch.cuda.is_available():
        pytest.fail("these tests need a CUDA device; leave out `-m gpu` on a machine without one")


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 2e-5)], ids=str
)
def test_values_and_gradients_are_those_of_the_definition(dtype, bound, kv_heads):
    """In bf16 and fp16 by the kernel, in fp32 text by text; relative to the largest, against fp32 on the CPU."""
    made = torch.Generator().manual_seed(0)
    rows, time = POSITIONS.shape
    lengths = text_lengths(POSITIONS)
    tensors = [torch.randn(rows, heads, time, HEAD, generator=made).to(dtype) for heads in (4, kv_heads, kv_heads)]
    weights = torch.randn(rows, time, 4, HEAD, generator=made)

    there = [tensor.to(DEVICE).requires_grad_() for tensor in tensors]
    capable = torch.cuda.get_device_capability() >= (8, 0) and dtype != torch.float32
    assert _has_kernel(*there, dropout=0.0) == capable
    ours = attention_by_text(None, *there, lengths, scaling=0.2)[0]
    ours = [ours, *torch.autograd.grad((ours * weights.to(DEVICE)).sum(), there)]

    here = [tensor.float().requires_grad_() for tensor in tensors]
    flat = (tensor.transpose(1, 2).flatten(0, 1) for tensor in here)
    truth = dense(*flat, lengths.flatten(), 0.2).view(rows, time, 4, HEAD)
    truth = [truth, *torch.autograd.grad((truth * weights).sum(), here)]
    for one, other in zip(ours, truth, strict=True):
        assert float((one.detach().cpu().float() - other).abs().max() / other.abs().max()) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_long_row_of_texts_takes_no_mask_and_no_waiting(dtype):
    """32,768 tokens: a mask of one byte an entry would be 1 GiB."""
    lengths = torch.tensor([9000, 1, 20000, 3767])
    positions = torch.cat([torch.arange(int(length)) for length in lengths])[None]
    query = torch.randn(1, 4, 32768, HEAD, device=DEVICE, dtype=dtype, requires_grad=True)
    attention_by_text(None, query, query, query, text_lengths(positions), scaling=0.1)[0].sum().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention_by_text(None, query, query, query, text_lengths(positions), scaling=0.1)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 16 * query.numel() * query.element_size()
    with_dropout = attention_by_text(None, query, query, query, text_lengths(positions), dropout=0.1, scaling=0.1)[0]
    assert with_dropout.isfinite().all()
