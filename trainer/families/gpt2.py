"""GPT-2 (Radford et al., 2019)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..recipe.precision import Precision
from .family import Attention, Family
from .param_spec import ParamSpec, linear, norm


def _inner(config: Mapping[str, Any]) -> int:
    return config["n_inner"] or 4 * config["n_embd"]


def _block(config: Mapping[str, Any]) -> list[ParamSpec]:
    width, inner, std = config["n_embd"], _inner(config), config["initializer_range"]
    residual_std = std / math.sqrt(2 * config["n_layer"])  # GPT-2 paper, section 2.3
    return [
        *norm("ln_1", width, bias=True),
        *linear("attn.c_attn", width, 3 * width, True, std, conv=True),
        *linear("attn.c_proj", width, width, True, residual_std, conv=True),
        *norm("ln_2", width, bias=True),
        *linear("mlp.c_fc", width, inner, True, std, conv=True),
        *linear("mlp.c_proj", inner, width, True, residual_std, conv=True),
    ]


def _mlp_bytes(config: Mapping[str, Any], precision: Precision, tensor: int) -> float:
    width, mask = config["n_embd"], config["resid_pdrop"] > 0
    casts = width * (precision.compute - precision.stream)  # of the input, which autocast keeps in its stead
    return 2 * _inner(config) / tensor * precision.compute + mask * width + (casts if precision.autocast else 0)


def _block_bytes(config: Mapping[str, Any], precision: Precision, tensor: int) -> float:
    width, stream = config["n_embd"], precision.stream
    split = (3 + 1) * width + 2 * _inner(config)  # q, k, v and attention's output; the MLP
    masks = (config["resid_pdrop"] > 0) * 2 * width  # a byte each; a CPU keeps none
    statistics = 4 * 4 + 4 * config["n_head"] / tensor
    return 2 * width * stream + masks + (2 * width + split / tensor) * precision.compute + statistics


GPT2 = Family(
    defaults={
        "n_layer": 12,
        "n_embd": 768,
        "n_head": 12,
        "n_inner": None,
        "n_positions": 1024,
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "summary_activation": None,
        "summary_proj_to_labels": True,
        "summary_first_dropout": 0.1,
    },
    aliases={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    embedding="transformer.wte",
    positions="transformer.wpe",
    blocks="transformer.h",
    norm="transformer.ln_f",
    norm_bias=True,
    conv=True,
    block=_block,
    styles={
        "attn.c_attn": "packed_colwise",
        "attn.c_proj": "rowwise",
        "mlp.c_fc": "colwise",
        "mlp.c_proj": "rowwise",
    },
    feeds={"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)},
    attention=Attention(
        query="attn.c_attn",
        key="attn.c_attn",
        value="attn.c_attn",
        output="attn.c_proj",
        counts={"num_heads": "heads", "split_size": "width"},
    ),
    dropout={"embedding": "embd_pdrop", "attention": "attn_pdrop", "residual": "resid_pdrop"},
    block_bytes=_block_bytes,
    mlp="mlp",
    mlp_bytes=_mlp_bytes,
    noise={"attn.c_attn.bias": 1},  # of the keys
)
