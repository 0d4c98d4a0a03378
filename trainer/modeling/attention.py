"""Attention that stays inside each text of a row: on CPUs text by text, so that no mask of time x time is ever made.

What transformers' models pass on as the mask is then a tensor of the texts' lengths. Elsewhere it is the dense one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kernels.attention import causal_attention

BY_TEXT = "zeropipe_by_text"  # in transformers' registries of attentions and masks


def text_lengths(positions: Tensor | None) -> Tensor | None:
    """The mask of rows that hold several texts, [1, 1, 1, texts] int64: lengths of all texts, row after row.

    Args:
        positions: [rows, time]; a text ends where the next position does not follow.

    Returns:
        None where every row is one text, or where a dense mask is faster than many small calls (not on a CPU).
    """
    if positions is None or positions.device.type != "cpu":
        return None
    begins = torch.ones(positions.shape, dtype=torch.bool)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    starts = begins.flatten().nonzero()[:, 0]
    if len(starts) == len(positions):
        return None
    return torch.diff(starts, append=torch.tensor([positions.numel()]))[None, None, None]


def causal_mask(config: Any, hidden: Tensor, positions: Tensor) -> Tensor | None:
    """What a block's attention takes as its mask: the texts' lengths, or else transformers' own, None where there is no
    more to it than causality.

    Args:
        config: transformers', with its attention set.
        hidden: [rows, time, …], of the type that is computed in.
    """
    lengths = text_lengths(positions)
    if lengths is not None:
        return lengths
    return create_causal_mask(
        config=config, inputs_embeds=hidden, attention_mask=None, past_key_values=None, position_ids=positions
    )


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
        attention_mask: of `text_lengths`; any other is scaled dot product attention's.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        if attention_mask is None and dropout > 0 and query.device.type == "cpu" and query.shape[2] == key.shape[2]:
            copies = query.shape[1] // key.shape[1]
            whole = causal_attention(query, repeat_kv(key, copies), repeat_kv(value, copies), dropout, scaling)
            return whole.transpose(1, 2), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    rows, heads, time, _ = query.shape
    lengths = attention_mask.flatten().tolist()
    copies = heads // key.shape[1]
    whole = (query, repeat_kv(key, copies), repeat_kv(value, copies))
    # split, not sliced: the gradient of a slice is as large as what it was cut from
    pieces = [tensor.transpose(1, 2).reshape(1, rows * time, heads, -1).split(lengths, 1) for tensor in whole]
    texts = [tuple(piece.transpose(1, 2) for piece in text) for text in zip(*pieces, strict=True)]
    if dropout > 0:
        outputs = [causal_attention(q, k, v, dropout, scaling) for q, k, v in texts]
    else:
        outputs = [F.scaled_dot_product_attention(*text, is_causal=True, scale=scaling) for text in texts]
    return torch.cat([output.transpose(1, 2) for output in outputs], 1).view(rows, time, heads, -1), None


ALL_ATTENTION_FUNCTIONS.register(BY_TEXT, attention_by_text)
ALL_MASK_ATTENTION_FUNCTIONS.register(BY_TEXT, sdpa_mask)
