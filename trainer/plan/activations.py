"""Bytes that a forward pass keeps for the backward pass, counted tensor by tensor as Hugging Face's blocks save them.

Attention is counted as the fused kernels keep it (queries, keys, values, output and one number per head and token). On
a CPU attention *dropout* takes an unfused path that keeps three more matrices of time x time per head: left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HEAD_CHUNK_BYTES = 64 << 20  # of the objective's fp32 logits, which it computes chunk by chunk


@dataclass(frozen=True)
class Widths:
    """Bytes of the two kinds of numbers in a forward pass."""

    compute: int  # what matrix products read and write
    stream: int  # the residual stream and the inputs of norms


WIDTHS: Mapping[str, Widths] = {
    "fp32": Widths(4, 4),
    "bf16": Widths(2, 2),
    "fp16": Widths(2, 2),
    "bf16_autocast": Widths(2, 4),
}


def block_bytes(model: Mapping[str, Any], precision: str, tensor: int = 1) -> int:
    """Bytes that one block keeps per token."""
    widths = WIDTHS[precision]
    kept = _llama_block if model["model_type"] == "llama" else _gpt2_block
    return round(kept(model, widths, precision, tensor))


def _gpt2_block(model: Mapping[str, Any], widths: Widths, precision: str, tensor: int) -> float:
    width = model.get("n_embd", 768)
    inner = model.get("n_inner") or 4 * width
    # transformers' gelu_new is a chain of element-wise operations and keeps its input, tanh and both factors
    in_mlp = 5 if model.get("activation_function", "gelu_new") in ("gelu_new", "gelu_fast") else 2
    split = (3 + 1) * width + in_mlp * inner  # q, k, v and attention's output; the MLP
    masks = (model.get("resid_pdrop", 0.1) > 0) * 2 * width
    statistics = 4 * 4 + 4 * model.get("n_head", 12) / tensor
    return 2 * width * widths.stream + (2 * width + masks + split / tensor) * widths.compute + statistics


def _llama_block(model: Mapping[str, Any], widths: Widths, precision: str, tensor: int) -> float:
    width = model.get("hidden_size", 4096)
    heads = model.get("num_attention_heads", 32)
    head = model.get("head_dim") or width // heads
    kv_heads = max(tensor, model.get("num_key_value_heads") or heads)
    inner = model.get("intermediate_size", 11008)
    split = (2 * heads + 2 * kv_heads) * head + 4 * inner  # q, k, v, output; gate, its activation, up, their product
    norm = 4 + widths.stream  # the input in fp32, and the normed input
    # the scaled output feeds q, k, v and gate, up; under autocast each of the five casts it for itself
    outputs = 5 if precision == "bf16_autocast" else 2
    statistics = 2 * 4 + 4 * heads / tensor
    return 2 * width * norm + (outputs * width + split / tensor) * widths.compute + statistics


def activation_bytes(
    model: Mapping[str, Any],
    precision: str,
    tokens: int,
    layers: int,
    *,
    in_flight: int = 1,
    checkpointing: bool = False,
    head: bool = True,
    padded_vocab: int = 0,
    tensor: int = 1,
    chunks: bool = True,
) -> int:
    """Bytes of activations at the peak of one rank's backward pass.

    Args:
        tokens: of one micro batch on this rank.
        layers: blocks on this rank.
        in_flight: micro batches whose activations this rank holds at once (a pipeline's first stages hold several).
        head: whether the final norm, the output embedding and the loss are on this rank.
        padded_vocab: columns of the whole output embedding.
        chunks: whether the loss is computed in chunks; a pipeline's head makes all logits of a micro batch.
    """
    width = model.get("n_embd", 768) if model["model_type"] == "gpt2" else model.get("hidden_size", 4096)
    widths = WIDTHS[precision]
    block = block_bytes(model, precision, tensor)
    if checkpointing:  # a block's input stays; one block at a time is computed again
        total = tokens * (layers * width * widths.stream * in_flight + (block if layers else 0))
    else:
        total = tokens * layers * block * in_flight
    if head:
        normed = 4 if model["model_type"] == "llama" else 0  # RMSNorm keeps its normed input beside the input
        cast = widths.compute if widths.compute < widths.stream else 0
        total += tokens * width * (2 * widths.stream + normed + cast)  # final norm and what the head reads
        total += head_bytes(tokens, padded_vocab, tensor, chunks)
    return total


def head_bytes(tokens: int, padded_vocab: int, tensor: int = 1, chunks: bool = True) -> int:
    """Logits, log-probabilities and their gradients of one chunk of the loss: three fp32 numbers a column."""
    rows = min(tokens, max(1, HEAD_CHUNK_BYTES // (4 * padded_vocab))) if chunks else tokens
    return rows * 12 * padded_vocab // tensor
