"""A model of transformers on the meta device: every module and every shape of it, and no memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...data_prep.errors import UserError


def skeleton(config: Mapping[str, Any], attention: str | None = None) -> Any:
    """Transformers' causal LM of a configuration, tied as it says, on the meta device.

    Args:
        config: transformers' names, `model_type` among them.
        attention: an implementation in transformers' registry; None: the best that the family has.

    Raises:
        UserError: the family is unknown to transformers, or the configuration is wrong for it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, initialization

    try:
        hf_config = AutoConfig.for_model(**config)
        hf_config.use_cache = False
        with torch.device("meta"), initialization.no_init_weights():
            model = AutoModelForCausalLM.from_config(hf_config, attn_implementation=attention)
    except (ValueError, TypeError, KeyError, AssertionError, AttributeError, IndexError, ImportError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model.config: transformers cannot build a causal LM from it: {said}") from error
    model.tie_weights()
    return model


def materialise_buffers(model: Any, device: torch.device) -> None:
    """Buffers hold nothing learnt (rotary frequencies, say): transformers computes them from the configuration."""
    for module in model.modules():
        buffers = {name: b for name, b in module._buffers.items() if b is not None and b.is_meta}
        for name, buffer in buffers.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if buffers:
            model._init_weights(module)
        for name in buffers:
            module._buffers[name] = module._buffers[name].to(device)


def with_parts(module: nn.Module, parts: Mapping[str, nn.Module]) -> Any:
    """A copy of a module, its parameters and parts shared with it, in which other modules stand under some paths."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    below: dict[str, dict[str, nn.Module]] = {}
    for path, part in parts.items():
        first, _, rest = path.partition(".")
        if rest:
            below.setdefault(first, {})[rest] = part
        else:
            twin._modules[first] = part
    for first, inner in below.items():
        twin._modules[first] = with_parts(twin._modules[first], inner)  # type: ignore[arg-type]
    return twin
