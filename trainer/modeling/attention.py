"""Attention that looks back to where its text begins and no further, on any device, without a mask of time x time.

Of a row that is one text it needs to be told nothing. Of rows that hold several, what transformers' models pass on as
the mask is the texts' lengths: flash attention's kernel for sequences of different lengths takes them where it runs
(CUDA, bf16 or fp16, no dropout), and elsewhere attention goes text by text.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kernels.attention import causal_attention
from ..kernels.compiled import uncompiled

BY_TEXT = "zeropipe_by_text"  # in transformers' registries of attentions and masks
CAUSAL = (-1, 0)  # window of the kernel: everything before, nothing after


def text_lengths(positions: Tensor | None) -> Tensor:
    """The mask, on the host: [1, 1, 1, texts] int64, the lengths of all texts, row after row.

    It has the four dimensions of a mask that transformers passes on as it is, and so makes none of its own.

    Args:
        positions: [rows, time]; a text ends where the next position does not follow. Best on the host: from a device it
            is waited for. None: every row is one text.

    Returns:
        No lengths where every row is one text.
    """
    if positions is None:
        return torch.empty(1, 1, 1, 0, dtype=torch.int64)
    begins = torch.ones(positions.shape, dtype=torch.bool, device=positions.device)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    starts = begins.flatten().nonzero()[:, 0].cpu()
    if len(starts) == len(positions):
        return text_lengths(None)
    return torch.diff(starts, append=torch.tensor([positions.numel()]))[None, None, None]


def attention_by_text(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [rows, heads, time, head size] in, [rows, time, heads, head size] out.

    Args:
        key, value: may have fewer heads, each for some of the queries'.
        attention_mask: of `text_lengths`; any other is scaled dot product attention's.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if not attention_mask.numel():
        return _causal(query, key, value, dropout, scaling).transpose(1, 2).contiguous(), None
    rows, _, time, _ = query.shape
    lengths = attention_mask.flatten()
    kernel = _has_kernel(query, key, value, dropout)
    # all rows after each other: [tokens, heads, head size]
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    if kernel:
        output = _in_one_kernel(query, key, value, lengths, scaling)
    else:
        output = _one_after_the_other(query, key, value, lengths, scaling, dropout)
    return output.unflatten(0, (rows, time)), None


def _has_kernel(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether flash attention takes these: it knows no fp32, no old GPUs and no large heads, and for texts of different
    lengths no dropout."""
    if query.device.type != "cuda" or dropout > 0:
        return False
    params = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, query.shape[1] > key.shape[1])
    return torch.backends.cuda.can_use_flash_attention(params)


def _in_one_kernel(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scaling: float | None) -> Tensor:
    """[tokens, heads, head size] in and out; the lengths are on the host, so that nothing is waited for."""
    bounds = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32).to(query.device, non_blocking=True)
    longest = int(lengths.max())
    grouped = query.shape[1] > key.shape[1]
    return varlen_attn(  # type: ignore[return-value]
        query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=CAUSAL, enable_gqa=grouped
    )


@uncompiled
def _one_after_the_other(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scaling: float | None, dropout: float
) -> Tensor:
    """As `_in_one_kernel`, with whatever kernel scaled dot product attention has."""
    # split, not sliced: the gradient of a slice is as large as what it was cut from
    pieces = [tensor.transpose(0, 1)[None].split(lengths.tolist(), 2) for tensor in (query, key, value)]
    outputs = [_causal(q, k, v, dropout, scaling)[0].transpose(0, 1) for q, k, v in zip(*pieces, strict=True)]
    return torch.cat(outputs)


def _causal(query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None) -> Tensor:
    """[rows, heads, time, head size], each row one text."""
    grouped = query.shape[1] > key.shape[1]
    if dropout == 0 or query.device.type != "cpu":
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    if grouped:
        copies = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(copies, 1) for tensor in (key, value))
    return causal_attention(query, key, value, dropout, scaling)


ALL_ATTENTION_FUNCTIONS.register(BY_TEXT, attention_by_text)
ALL_MASK_ATTENTION_FUNCTIONS.register(BY_TEXT, sdpa_mask)
