"""Bytes that a forward pass keeps for the backward pass, counted tensor by tensor as Hugging Face's blocks save them.

Attention is counted as the fused kernels keep it (queries, keys, values, output and one number per head and token).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..families.registry import FAMILIES
from ..modeling.chunks import chunk_rows
from ..recipe.precision import Precision


def activation_bytes(
    model: Mapping[str, Any],
    precision: Precision,
    tokens: int,
    layers: int,
    *,
    in_flight: int = 1,
    checkpointing: bool = False,
    head: bool = True,
    padded_vocab: int = 0,
    tensor: int = 1,
) -> int:
    """Bytes of activations at the peak of one rank's backward pass.

    Args:
        model: configuration of a family that has a record.
        tokens: of one micro batch on this rank.
        layers: blocks on this rank.
        in_flight: micro batches whose activations this rank holds at once (a pipeline's first stages hold several).
        head: whether the final norm, the output embedding and the loss are on this rank.
        padded_vocab: columns of the whole output embedding.
    """
    family = FAMILIES[model["model_type"]]
    width = family.value(model, "hidden_size")
    block = round(family.block_bytes(family.complete(model), precision, tensor))
    if checkpointing:  # a block's input stays; one block at a time is computed again
        total = tokens * (layers * width * precision.stream * in_flight + (block if layers else 0))
    else:
        total = tokens * layers * block * in_flight
    if head:
        cast = precision.compute if precision.autocast else 0
        total += tokens * width * (2 * precision.stream + family.norm_bytes + cast)  # the last norm, the head's input
        total += head_bytes(tokens, padded_vocab, tensor)
    return total


def head_bytes(tokens: int, padded_vocab: int, tensor: int = 1) -> int:
    """Logits, log-probabilities and their gradients of one chunk of the loss: three fp32 numbers a column."""
    return min(tokens, chunk_rows(padded_vocab)) * 12 * padded_vocab // tensor
