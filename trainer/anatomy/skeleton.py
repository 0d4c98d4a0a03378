"""A model of transformers on the meta device: every module and every shape of it, and no memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...data_prep.errors import UserError
from .buffers import name_buffers


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
            model = AutoModelForCausalLM.from_config(hf_config, attn_implementation=attention, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, AssertionError, AttributeError, IndexError, ImportError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model.config: transformers cannot build a causal LM from it: {said}") from error
    model.tie_weights()
    name_buffers(model)
    return model


def materialise_buffers(model: Any, device: torch.device) -> None:
    """What transformers computes buffers to be from the configuration (rotary frequencies, say).

    Of the whole model at once, while the parameters are on the meta device and cost nothing: some are their parent's.
    """
    buffers = {(module, name): b for module in model.modules() for name, b in module._buffers.items() if b is not None}
    for (module, name), buffer in buffers.items():
        module._buffers[name] = unset(buffer)
    with torch.random.fork_rng(devices=[]):
        model.initialize_weights()
    for (module, name), _ in buffers.items():
        module._buffers[name] = filled(module._buffers[name], name, model).to(device)


def unset(like: Tensor) -> Tensor:
    """On the CPU; where nothing sets it, `filled` sees it."""
    return torch.full(like.shape, math.nan if like.is_floating_point() else 0, dtype=like.dtype, device="cpu")


def filled(tensor: Tensor, name: str, model: nn.Module) -> Tensor:
    if tensor.is_floating_point() and tensor.isnan().any():
        raise UserError(f"model.config: transformers' {type(model).__name__} draws no initial value for {name}")
    return tensor


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
