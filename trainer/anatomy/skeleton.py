"""A model of transformers on the meta device: every module and every shape of it, and no memory."""

from __future__ import annotations

import copy
import inspect
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
        module._buffers[name] = filled(module._buffers[name], module, name, model).to(device)


def unset(like: Tensor) -> Tensor:
    """On the CPU; where nothing sets it, `filled` sees it."""
    return torch.full(like.shape, math.nan if like.is_floating_point() else 0, dtype=like.dtype, device="cpu")


def filled(tensor: Tensor, owner: nn.Module, name: str, model: nn.Module) -> Tensor:
    """A parameter or buffer `name` of its owner, drawn; what nothing drew has the value that the constructor gives it.

    Raises:
        UserError: it has none that can be asked for.
    """
    if not (tensor.is_floating_point() and tensor.isnan().any()):
        return tensor
    value = _constructed(owner, name, tensor)
    if value is None or value.shape != tensor.shape:
        kind = type(owner).__name__
        raise UserError(
            f"model.config: transformers' {type(model).__name__} draws no initial value for {name} of {kind}"
        )
    return value.detach().to(tensor.dtype)


def _constructed(owner: nn.Module, name: str, like: Tensor) -> Tensor | None:
    """What a module with the same scalars holds, of a class that can be made without being told anything."""
    known = inspect.signature(type(owner).__init__).parameters.values()
    told = [p for p in known if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(told) > 1:  # more than self
        return None
    fresh = type(owner)(**{"dtype": like.dtype} if any(p.name == "dtype" for p in known) else {})
    if _scalars(fresh) != _scalars(owner):
        return None
    return {**fresh._parameters, **fresh._buffers}.get(name)


def _scalars(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if type(value) in (int, float, str) and key[:2] != "__"}


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
