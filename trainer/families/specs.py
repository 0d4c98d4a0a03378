"""The table of parameters: one row per Hugging Face parameter, for initialisation, tensor parallelism, pipeline stages,
checkpoints, export and the memory plan. Needs no torch, so that a login node can plan.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...data_prep.errors import UserError

VOCAB_MULTIPLE = 128  # the vocabulary is padded to a multiple of this times the tensor parallel size

Kind = Literal["vocab", "column", "row", "replicated"]
Init = Literal["normal", "ones", "zeros"]


@dataclass(frozen=True)
class ParamSpec:
    """One parameter as Hugging Face names and shapes it, and how it is split over tensor-parallel ranks.

    A split runs along `dim` in units of `grain` (the head size, where heads must stay whole), separately in each of
    `parts` (fused Q, K, V). With fewer units than ranks, neighbouring ranks hold copies of one unit.
    """

    name: str
    shape: tuple[int, ...]  # of the Hugging Face parameter: no padding
    kind: Kind = "replicated"
    dim: int | None = None
    parts: tuple[int, ...] | None = None
    grain: int = 1
    init: Init = "normal"
    std: float = 0.02
    padded_rows: int | None = None  # rows of a vocabulary parameter as trained; the rows beyond `shape` are zero

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """Shape as trained: `shape`, with the vocabulary padded."""
        return self.shape if self.padded_rows is None else (self.padded_rows, *self.shape[1:])

    @property
    def numel(self) -> int:
        return math.prod(self.padded_shape)

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, not to norms and biases."""
        return len(self.shape) > 1

    def ranges(self, rank: int, size: int) -> list[tuple[int, int]]:
        """Half-open ranges along `dim` of the (padded) whole that tensor-parallel `rank` of `size` holds, in order."""
        if self.dim is None:
            raise ValueError(f"{self.name} is replicated and has no ranges")
        ranges, start = [], 0
        for part in self.parts or (self.padded_shape[self.dim],):
            units = part // self.grain
            first = units * rank // size
            last = units * (rank + 1) // size if units >= size else first + 1
            ranges.append((start + first * self.grain, start + last * self.grain))
            start += part
        return ranges

    def local_shape(self, rank: int, size: int) -> tuple[int, ...]:
        """Shape of the piece that tensor-parallel `rank` of `size` holds."""
        if self.dim is None or size == 1:
            return self.padded_shape
        width = sum(stop - start for start, stop in self.ranges(rank, size))
        return (*self.padded_shape[: self.dim], width, *self.padded_shape[self.dim + 1 :])

    def copies(self, size: int) -> int:
        """How many tensor-parallel ranks hold the same piece."""
        if self.dim is None:
            return size
        units = (self.parts or (self.padded_shape[self.dim],))[0] // self.grain
        return 1 if units >= size else size // units


def parameter_seed(seed: int, name: str) -> int:
    """Seed of one parameter's initial values: depends on the run's seed and the name, never on the layout."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # torch takes a non-negative int64


def padded_vocab(vocab_size: int, tensor: int = 1) -> int:
    """Vocabulary as trained: rounded up so that every tensor-parallel rank holds a multiple of 128 rows."""
    multiple = VOCAB_MULTIPLE * tensor
    return -(-vocab_size // multiple) * multiple


def _gpt2(config: Mapping[str, Any], padded: int) -> list[ParamSpec]:
    width = config.get("n_embd", 768)
    layers, heads = config.get("n_layer", 12), config.get("n_head", 12)
    inner = config.get("n_inner") or 4 * width
    std = config.get("initializer_range", 0.02)
    residual_std = std / math.sqrt(2 * layers)  # GPT-2 paper, section 2.3
    vocab, head = config.get("vocab_size", 50257), width // heads
    specs = [
        ParamSpec("transformer.wte.weight", (vocab, width), "vocab", 0, std=std, padded_rows=padded),
        ParamSpec("transformer.wpe.weight", (config.get("n_positions", 1024), width), std=std),
    ]
    qkv = (width, width, width)
    for layer in range(layers):
        p = f"transformer.h.{layer}."
        specs += [
            ParamSpec(p + "ln_1.weight", (width,), init="ones"),
            ParamSpec(p + "ln_1.bias", (width,), init="zeros"),
            # Conv1D keeps its weight as [in, out]: columns split dimension 1, rows dimension 0
            ParamSpec(p + "attn.c_attn.weight", (width, 3 * width), "column", 1, qkv, head, std=std),
            ParamSpec(p + "attn.c_attn.bias", (3 * width,), "column", 0, qkv, head, init="zeros"),
            ParamSpec(p + "attn.c_proj.weight", (width, width), "row", 0, grain=head, std=residual_std),
            ParamSpec(p + "attn.c_proj.bias", (width,), init="zeros"),
            ParamSpec(p + "ln_2.weight", (width,), init="ones"),
            ParamSpec(p + "ln_2.bias", (width,), init="zeros"),
            ParamSpec(p + "mlp.c_fc.weight", (width, inner), "column", 1, std=std),
            ParamSpec(p + "mlp.c_fc.bias", (inner,), "column", 0, init="zeros"),
            ParamSpec(p + "mlp.c_proj.weight", (inner, width), "row", 0, std=residual_std),
            ParamSpec(p + "mlp.c_proj.bias", (width,), init="zeros"),
        ]
    specs += [
        ParamSpec("transformer.ln_f.weight", (width,), init="ones"),
        ParamSpec("transformer.ln_f.bias", (width,), init="zeros"),
    ]
    if not config.get("tie_word_embeddings", True):
        specs.append(ParamSpec("lm_head.weight", (vocab, width), "vocab", 0, std=std, padded_rows=padded))
    return specs


def _llama(config: Mapping[str, Any], padded: int) -> list[ParamSpec]:
    width = config.get("hidden_size", 4096)
    layers, heads = config.get("num_hidden_layers", 32), config.get("num_attention_heads", 32)
    kv_heads = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or width // heads
    inner, std = config.get("intermediate_size", 11008), config.get("initializer_range", 0.02)
    vocab = config.get("vocab_size", 32000)
    attention_bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
    specs = [ParamSpec("model.embed_tokens.weight", (vocab, width), "vocab", 0, std=std, padded_rows=padded)]

    def linear(name: str, out: int, into: int, kind: Kind, grain: int, bias: bool) -> None:
        dim = 0 if kind == "column" else 1
        specs.append(ParamSpec(name + ".weight", (out, into), kind, dim, grain=grain, std=std))
        if bias and kind == "column":
            specs.append(ParamSpec(name + ".bias", (out,), kind, 0, grain=grain, init="zeros"))
        elif bias:
            specs.append(ParamSpec(name + ".bias", (out,), init="zeros"))

    for layer in range(layers):
        p = f"model.layers.{layer}."
        linear(p + "self_attn.q_proj", heads * head, width, "column", head, attention_bias)
        linear(p + "self_attn.k_proj", kv_heads * head, width, "column", head, attention_bias)
        linear(p + "self_attn.v_proj", kv_heads * head, width, "column", head, attention_bias)
        linear(p + "self_attn.o_proj", width, heads * head, "row", head, attention_bias)
        linear(p + "mlp.gate_proj", inner, width, "column", 1, mlp_bias)
        linear(p + "mlp.up_proj", inner, width, "column", 1, mlp_bias)
        linear(p + "mlp.down_proj", width, inner, "row", 1, mlp_bias)
        specs.append(ParamSpec(p + "input_layernorm.weight", (width,), init="ones"))
        specs.append(ParamSpec(p + "post_attention_layernorm.weight", (width,), init="ones"))
    specs.append(ParamSpec("model.norm.weight", (width,), init="ones"))
    if not config.get("tie_word_embeddings", False):
        specs.append(ParamSpec("lm_head.weight", (vocab, width), "vocab", 0, std=std, padded_rows=padded))
    return specs


TABLES: Mapping[str, Callable[[Mapping[str, Any], int], list[ParamSpec]]] = {"gpt2": _gpt2, "llama": _llama}


def parameter_table(config: Mapping[str, Any], tensor: int = 1) -> list[ParamSpec]:
    """The parameters of a model, in Hugging Face's order, tied ones once.

    Args:
        config: transformers' own configuration names, `model_type` and `vocab_size` among them.
        tensor: tensor parallel size, which the padding of the vocabulary depends on.

    Raises:
        UserError: the family has no table (such a model trains on every ZeRO stage, but only there).
    """
    family = config.get("model_type", "")
    if family not in TABLES:
        raise UserError(
            f"model.config.model_type: no parameter table for {family!r}; there are tables for {', '.join(TABLES)}"
        )
    return TABLES[family](config, padded_vocab(config["vocab_size"], tensor))
