"""Causal attention with dropout, on CPUs, where torch's fused kernel knows no dropout.

As in FlashAttention-2 (arXiv:2307.08691) a block of queries at a time meets the keys that it may see, and the backward
pass computes the probabilities again: memory grows with the sequence, not with its square, and what lies above the
diagonal is not computed. Scores and probabilities are fp32; what the products read is of the inputs' type.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .compiled import uncompiled
from .dropout import Masks

_QUERIES = 128  # of one block
_CACHED_BYTES = 4 << 20  # of its fp32 scores


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, masks: Masks) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            output = query.new_empty(*query.shape[:2], value.shape[2])
            spread = query.new_empty(*query.shape[:2], 1, dtype=torch.float32)
            wide_query, wide_key = query.float() * scale, key.float().mT
            for part, (heads, rows, end) in enumerate(_blocks(query)):
                scores = _scores(wide_query, wide_key, heads, rows, end)
                peak = scores.amax(-1, keepdim=True)
                total = scores.sub_(peak).exp_().sum(-1, keepdim=True)
                spread[heads, rows] = peak + total.log()
                scores.masked_fill_(masks.zeroed(scores.shape, part), 0)
                mixed = torch.bmm(scores.to(value.dtype), value[heads, :end])
                output[heads, rows] = (mixed * (masks.scale / total)).to(output.dtype)
        ctx.save_for_backward(query, key, value, output, spread)
        ctx.scale, ctx.masks = scale, masks
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, spread = ctx.saved_tensors
        masks, given, dtype = ctx.masks, gradients[0], query.dtype
        with torch.autocast("cpu", enabled=False):
            to_query = torch.empty_like(query)
            to_key, to_value = (torch.zeros(t.shape, dtype=torch.float32) for t in (key, value))
            mean = (given.float() * output.float()).sum(-1, keepdim=True) / masks.scale
            wide_query, wide_key = query.float() * ctx.scale, key.float().mT
            for part, (heads, rows, end) in enumerate(_blocks(query)):
                chances = _scores(wide_query, wide_key, heads, rows, end).sub_(spread[heads, rows]).exp_()
                zeroed = masks.zeroed(chances.shape, part)
                slope = torch.bmm(given[heads, rows], value[heads, :end].mT).float().masked_fill_(zeroed, 0)
                slope = slope.sub_(mean[heads, rows]).mul_(chances).to(dtype)
                kept = chances.masked_fill_(zeroed, 0).to(dtype)
                to_query[heads, rows] = torch.bmm(slope, key[heads, :end])
                to_key[heads, :end] += torch.bmm(slope.mT, query[heads, rows])
                to_value[heads, :end] += torch.bmm(kept.mT, given[heads, rows])
            factor = ctx.scale * masks.scale
            found = to_query.mul_(factor), to_key.mul_(factor).to(dtype), to_value.mul_(masks.scale).to(dtype)
        return *found, None, None


def _blocks(query: Tensor) -> Iterator[tuple[slice, slice, int]]:
    """Heads and queries of every block, and how many keys they may see."""
    heads, time, _ = query.shape
    for first in range(0, time, _QUERIES):
        end = min(first + _QUERIES, time)
        at_once = max(1, _CACHED_BYTES // (4 * (end - first) * end))
        for head in range(0, heads, at_once):
            yield slice(head, min(head + at_once, heads)), slice(first, end), end


def _scores(query: Tensor, key: Tensor, heads: slice, rows: slice, end: int) -> Tensor:
    """Scores of a block, -inf above the diagonal; `query` is scaled, `key` transposed."""
    scores = torch.bmm(query[heads, rows], key[heads, :, :end])
    size = rows.stop - rows.start
    scores[:, :, rows.start :] += torch.full((size, size), -math.inf).triu(1)
    return scores


@uncompiled
def causal_attention(query: Tensor, key: Tensor, value: Tensor, p: float, scale: float | None = None) -> Tensor:
    """As `scaled_dot_product_attention(…, dropout_p=p, is_causal=True)`, in what autocast computes in.

    Args:
        query, key, value: [rows, heads, time, head size], on a CPU.
        p: share of the probabilities that become zero, between 0 and 1.
    """
    dtype = query.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    flat = [tensor.to(dtype).flatten(0, 1) for tensor in (query, key, value)]
    output: Any = _CausalAttention.apply(*flat, query.shape[-1] ** -0.5 if scale is None else scale, Masks.drawn(p))
    return output.unflatten(0, query.shape[:2])
