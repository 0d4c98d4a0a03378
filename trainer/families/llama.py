"""Llama (Touvron et al., arXiv:2302.13971), with grouped key-value heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..recipe.precision import Precision
from .family import Attention, Family
from .param_spec import ParamSpec, linear, norm


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Query heads, key-value heads, and the size of a head."""
    heads = config["num_attention_heads"]
    return heads, config["num_key_value_heads"] or heads, config["head_dim"] or config["hidden_size"] // heads


def _block(config: Mapping[str, Any]) -> list[ParamSpec]:
    width, inner, std = config["hidden_size"], config["intermediate_size"], config["initializer_range"]
    heads, kv_heads, head = _heads(config)
    attention_bias, mlp_bias = config["attention_bias"], config["mlp_bias"]
    linears = [
        ("self_attn.q_proj", width, heads * head, attention_bias),
        ("self_attn.k_proj", width, kv_heads * head, attention_bias),
        ("self_attn.v_proj", width, kv_heads * head, attention_bias),
        ("self_attn.o_proj", heads * head, width, attention_bias),
        ("mlp.gate_proj", width, inner, mlp_bias),
        ("mlp.up_proj", width, inner, mlp_bias),
        ("mlp.down_proj", inner, width, mlp_bias),
    ]
    specs = [spec for row in linears for spec in linear(*row, std=std)]
    return [*specs, *norm("input_layernorm", width), *norm("post_attention_layernorm", width)]


def _mlp_bytes(config: Mapping[str, Any], precision: Precision, tensor: int) -> float:
    # gate, its activation, up, their product; under autocast gate and up cast the input, each for itself
    inside = 4 * config["intermediate_size"] / tensor * precision.compute
    casts = config["hidden_size"] * (2 * precision.compute - precision.stream)
    return inside + (casts if precision.autocast else 0)


def _block_bytes(config: Mapping[str, Any], precision: Precision, tensor: int) -> float:
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads, head = _heads(config)
    # q, k, v, output; gate, its activation, up, their product
    split = (2 * heads + 2 * max(tensor, kv_heads)) * head + 4 * inner
    in_norm = 4 + precision.stream  # the input in fp32, and the normed input
    # the scaled output feeds q, k, v and gate, up; under autocast each of the five casts it for itself
    outputs = 5 if precision.autocast else 2
    statistics = 2 * 4 + 4 * heads / tensor
    return 2 * width * in_norm + (outputs * width + split / tensor) * precision.compute + statistics


LLAMA = Family(
    defaults={
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
    },
    extra_keys=frozenset(("rope_theta", "rope_scaling")),  # older spellings of rope_parameters
    embedding="model.embed_tokens",
    blocks="model.layers",
    norm="model.norm",
    norm_bytes=4,  # its normed input
    block=_block,
    styles={
        "self_attn.q_proj": "colwise",
        "self_attn.k_proj": "colwise",
        "self_attn.v_proj": "colwise",
        "self_attn.o_proj": "rowwise",
        "mlp.gate_proj": "colwise",
        "mlp.up_proj": "colwise",
        "mlp.down_proj": "rowwise",
    },
    feeds={
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    },
    attention=Attention(
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.o_proj",
        counts={"num_key_value_groups": "groups"},
    ),
    dropout={"attention": "attention_dropout"},
    block_bytes=_block_bytes,
    mlp="mlp",
    mlp_bytes=_mlp_bytes,
)
