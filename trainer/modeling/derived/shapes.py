"""A derived model run for its shapes alone, on the meta device: whether a split fits, and what a block keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...families.derived import Derived
from ...families.registry import family_of
from ...ranks.ranks import Ranks
from ...recipe.precision import Precision
from ..build import model_and_specs
from .words import split_over_ranks

_NAME = "zeropipe_shapes"  # of the attention, in transformers' registry
_TOKENS = 16


def shapes_fit(config: Mapping[str, Any], tensor: int) -> str | None:
    """What fails when a model runs with the slices of one of `tensor` ranks, in words; None if nothing does, or if the
    whole model cannot run on the meta device either.
    """
    stated = json.dumps(dict(config), sort_keys=True, default=str)
    problem = _problem(stated, tensor)
    return problem if problem is not None and _problem(stated, 1) is None else None


@lru_cache(maxsize=32)
def _problem(stated: str, tensor: int) -> str | None:
    model = _local(json.loads(stated), tensor)
    inside: list[str] = []

    def left(*_: Any) -> None:
        inside.pop()

    for path, module in model.base_model.named_modules():
        module.register_forward_pre_hook(lambda _m, _i, path=path: inside.append(path))
        module.register_forward_hook(left)
    try:
        model.base_model(input_ids=torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta"), use_cache=False)
    except Exception as error:  # whatever operators raise where shapes do not fit
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"{inside[-1] if inside else 'the model'} fails: {first[:160]}"
    return None


def _local(config: Mapping[str, Any], tensor: int, dtype: torch.dtype = torch.float32) -> Any:
    """A model of which every parameter has the shape that the first of `tensor` ranks holds."""
    model, specs = model_and_specs(config, tensor)
    made: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            name = f"{path}.{key}" if path else key
            if parameter is not None and name in specs:
                local = torch.empty(specs[name].local_shape(0, tensor), device="meta", dtype=dtype)
                made[name] = module._parameters[key] = nn.Parameter(local)
                made[name].spec = specs[name]  # type: ignore[attr-defined]
    for target, source in (model.all_tied_weights_keys or {}).items():
        if source in made:
            owner, _, key = target.rpartition(".")
            model.get_submodule(owner)._parameters[key] = made[source]
    split_over_ranks(model, family_of(config), Ranks(world=tensor, tensor_size=tensor))
    model.config.get_text_config()._attn_implementation = _NAME  # for which transformers makes no masks
    return model


def block_bytes(config: Mapping[str, Any], precision: Precision, tensor: int) -> float:
    """Kept for backward by a block per token, of tensor ranks: counted while the model runs on the meta device, with an
    attention that keeps what the fused kernels keep. Where it cannot run so (experts choose tokens), 17 numbers for
    each of the width (Korthikanti et al., arXiv:2205.05198, without the scores).
    """
    family = family_of(config)
    assert isinstance(family, Derived)
    found = _kept(json.dumps(dict(config), sort_keys=True, default=str), precision.weights, tensor)
    if found is None:
        return 17.0 * family.sizes["hidden_size"] * precision.compute
    half = precision.autocast  # inputs of products in bf16, the rest as it is: between the two, nearer to fp32
    return found * (0.75 if half else 1.0)


@lru_cache(maxsize=64)
def _kept(stated: str, weights: str, tensor: int) -> float | None:
    config = json.loads(stated)
    model = _local(config, tensor, getattr(torch, weights))
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # so that no storage is freed and its place taken by another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            held.append(tensor)
        return tensor

    family = family_of(config)
    try:
        ids = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.train().base_model(input_ids=ids, use_cache=False)
    except Exception:  # the whole of it is an estimate: see `block_bytes`
        return None
    assert family is not None
    return sum(kept.values()) / _TOKENS / family.value(config, "num_hidden_layers")


class _Shapes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        statistics = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, statistics)
        return output


def _attention(_module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return _Shapes.apply(query, key, value).transpose(1, 2), None  # type: ignore[union-attr]


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
