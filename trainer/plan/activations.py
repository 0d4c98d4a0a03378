"""Bytes that a forward pass keeps for the backward pass, counted tensor by tensor as Hugging Face's blocks save them.

Attention is counted as the fused kernels keep it (queries, keys, values, output and one number per head and token).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..families.derived import Derived
from ..families.family import Family
from ..families.registry import family_of
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
    mlp_tile: int = 0,
    head: bool = True,
    padded_vocab: int = 0,
    uniform: bool = True,
    tensor: int = 1,
) -> int:
    """Bytes of activations at the peak of one rank's backward pass.

    Args:
        model: configuration of a family that has a record.
        tokens: of one micro batch on this rank.
        layers: blocks on this rank.
        in_flight: micro batches whose activations this rank holds at once (a pipeline's first stages hold several).
        mlp_tile: as the recipe's.
        head: whether the final norm, the output embedding and the loss are on this rank.
        padded_vocab: columns of the whole output embedding.
        uniform: as `head_token_losses`.
    """
    family = family_of(model)
    assert family is not None
    width = family.value(model, "hidden_size")
    block = round(kept_by_block(model, family, precision, tensor))
    tile = 0
    if (
        layers and isinstance(family, Family) and family.mlp_bytes is not None and 0 < mlp_tile < tokens
    ):  # of one MLP at a time
        mlp = round(family.mlp_bytes(family.complete(model), precision, tensor))
        block, tile = block - mlp, mlp_tile * mlp
    if checkpointing:  # a block's input stays; one block at a time is computed again
        total = tokens * (layers * width * precision.stream * in_flight + (block if layers else 0)) + tile
    else:
        total = tokens * layers * block * in_flight + tile
    if head:
        cast = precision.compute if precision.autocast else 0
        total += tokens * width * (2 * precision.stream + family.norm_bytes + cast)  # the last norm, the head's input
        total += head_bytes(tokens, padded_vocab, precision, tensor, uniform)
    return total


def kept_by_block(model: Mapping[str, Any], family: Family | Derived, precision: Precision, tensor: int) -> float:
    """Bytes kept for backward by a block per token, of tensor ranks."""
    if isinstance(family, Family):
        return family.block_bytes(family.complete(model), precision, tensor)
    from ..modeling.derived.shapes import block_bytes

    return block_bytes(model, precision, tensor)


def head_bytes(tokens: int, padded_vocab: int, precision: Precision, tensor: int = 1, uniform: bool = True) -> int:
    """Logits of one chunk of the loss, and an fp32 copy whose place their gradient takes; where that is not known at
    once, one more. On a CPU there are fewer tokens in a chunk, but plans know of no device."""
    number = precision.compute + (4 if uniform else 8)
    return min(tokens, chunk_rows(padded_vocab)) * number * padded_vocab // tensor
