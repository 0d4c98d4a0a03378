"""Derives the record of a family from transformers' declarations and from its model on the meta device.

Needs torch and transformers, which are imported when it is asked: a few seconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from ...data_prep.errors import UserError
from .axes import check_blocks, check_sequence, shared_experts
from .derived import COLUMN_WORDS, GATHERED, PACKED, ROW_WORDS, SUMMED, WORDS, Axis, Derived, starred
from .derived import word_for as _word_for
from .overrides import MORE_WORDS, OVERRIDES
from .param_spec import Kind, ParamSpec, Split

_ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout_prob")
_SIZES = {"hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings"}


def derived(config: Mapping[str, Any]) -> Derived | None:
    """The record of a configuration, if transformers is there and builds a causal LM from it."""
    if not isinstance(config.get("model_type"), str) or find_spec("transformers") is None or find_spec("torch") is None:
        return None
    return _derived(json.dumps(dict(config), sort_keys=True, default=str))


@lru_cache(maxsize=32)
def _derived(stated: str) -> Derived | None:
    from ..anatomy.skeleton import skeleton

    config = json.loads(stated)
    try:
        model = skeleton(config)
        if not hasattr(model, "get_output_embeddings") or model.get_input_embeddings() is None:
            return None
        if model.get_output_embeddings() is None:
            return None
    except (UserError, NotImplementedError):
        return None
    return _record(config, model)


def _record(config: Mapping[str, Any], model: Any) -> Derived:
    from ..anatomy.head import logit_shape

    own, paths = model.config.get_text_config(), {id(module): path for path, module in model.named_modules()}
    embedding, head = paths[id(model.get_input_embeddings())], paths[id(model.get_output_embeddings())]
    refusals: dict[Axis, str] = dict(OVERRIDES.get(config["model_type"], {}))  # type: ignore[arg-type]
    blocks, norm = _places(model, own, refusals)
    words = _words(model, own, refusals)
    sizes = {key: _stated(own, key) for key in _SIZES}
    sizes["hidden_size"] = model.get_input_embeddings().weight.shape[1]
    sizes["head_dim"] = _head_size(own, sizes)
    pads = _pads(config, model, embedding, head)
    if not pads:
        refusals.setdefault("tensor", "something beside embedding and head depends on the size of the vocabulary")
    rows, tied = _rows(model, own, sizes, words, blocks, (embedding, head)), _tied(model, head)
    shape = logit_shape(model)
    if shape is None:
        refusals.setdefault("pipeline", "its logits are more than a scale and a cap of head(hidden)")
    check_blocks(model, blocks, embedding, norm, refusals)
    check_sequence(model, blocks, refusals)
    experts, each_layer = shared_experts(model, own, refusals)
    dropouts = [key for key, value in own.to_dict().items() if re.search("drop|jitter", key) and type(value) is float]
    return Derived(
        model_type=config["model_type"],
        sizes=sizes,
        rows=tuple(_in_order(rows, embedding, norm, head)),
        embedding=embedding,
        head=head,
        blocks=blocks,
        norm=norm,
        words=words,
        shape=shape,
        pads=pads,
        tied=tied,
        stateful=bool(getattr(model, "_is_stateful", False)),
        experts=experts,
        each_layer=each_layer,
        dropout={"attention" if key in _ATTENTION_DROPOUT else key: key for key in dropouts},
        refusals=refusals,
        aliases=dict(type(own).attribute_map or {}),
    )


def _places(model: Any, own: Any, refusals: dict[Axis, str]) -> tuple[str | None, str | None]:
    """The list of blocks and the last norm, as `base_model_pp_plan` says."""
    from torch import nn

    plan, prefix = getattr(own, "base_model_pp_plan", None), model.base_model_prefix
    if not plan:
        refusals.setdefault("pipeline", "transformers declares no pipeline of it (base_model_pp_plan)")
        return _list_of_blocks(model), None
    names = list(plan)
    blocks = next((name for name in names if isinstance(getattr(model.base_model, name, None), nn.ModuleList)), None)
    if blocks is None:
        refusals.setdefault("pipeline", "its base_model_pp_plan names no list of blocks")
        return _list_of_blocks(model), None
    behind = names[names.index(blocks) + 1 :]
    if len(behind) != 1:
        refusals.setdefault(
            "pipeline", f"behind its blocks its base_model_pp_plan has {', '.join(behind) or 'nothing'}"
        )
        return f"{prefix}.{blocks}", None
    return f"{prefix}.{blocks}", f"{prefix}.{behind[0]}"


def _list_of_blocks(model: Any) -> str | None:
    from torch import nn

    found = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return found[0] if found else None


def _words(model: Any, own: Any, refusals: dict[Axis, str]) -> dict[str, str]:
    """What `base_model_tp_plan` says, by whole names."""
    plan = getattr(own, "base_model_tp_plan", None)
    if not plan:
        refusals.setdefault("tensor", "transformers declares no split of it (base_model_tp_plan)")
        return {}
    plan = {**plan, **MORE_WORDS.get(own.model_type, {})}
    words = {f"{model.base_model_prefix}.{name}": word for name, word in plan.items()}
    present = {starred(path) for path, _ in (*model.named_modules(), *model.named_parameters())}
    used = {name: word for name, word in words.items() if name in present}
    if unknown := sorted(set(used.values()) - WORDS):
        refusals.setdefault("tensor", f"its base_model_tp_plan says {', '.join(unknown)}, which is not done here")
    if not any(word in COLUMN_WORDS for word in used.values()):
        refusals.setdefault("tensor", "its base_model_tp_plan splits nothing that this model has")
    return used


def _stated(own: Any, key: str) -> Any:
    """A size that a configuration comes to; of one that some layers have of their own, what it is for the others."""
    try:
        return getattr(own, key, None)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError
        return own.__dict__[key]


def _head_size(own: Any, sizes: Mapping[str, Any]) -> int:
    heads = sizes["num_attention_heads"]
    return _stated(own, "head_dim") or (sizes["hidden_size"] // heads if isinstance(heads, int) and heads else 1)


def _pads(config: Mapping[str, Any], model: Any, embedding: str, head: str) -> bool:
    """Whether rows of embedding and head, and nothing else, follow the size of the vocabulary."""
    from ..anatomy.skeleton import skeleton

    size = model.get_input_embeddings().weight.shape[0]
    try:
        larger = dict(skeleton({**config, "vocab_size": size + 128}).named_parameters())
    except UserError:
        return False
    before = dict(model.named_parameters())
    if before.keys() != larger.keys() or model.get_output_embeddings().weight.shape[0] != size:
        return False
    changed = {name for name, p in before.items() if p.shape != larger[name].shape}
    allowed = {f"{embedding}.weight", f"{head}.weight", f"{head}.bias"}
    grown = all(larger[name].shape == (size + 128, *before[name].shape[1:]) for name in changed)
    return bool(changed) and changed <= allowed and grown


def _tied(model: Any, head: str) -> bool:
    return f"{head}.weight" not in dict(model.named_parameters())


def _rows(
    model: Any,
    own: Any,
    sizes: Mapping[str, Any],
    words: Mapping[str, str],
    blocks: str | None,
    vocabulary: tuple[str, str],
) -> Iterator[ParamSpec]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    seen: set[int] = set()  # tied ones count once, where they come first
    # what chooses tokens to attend to: no gradient goes through a choice, and plain AdamW leaves such weights alone
    choosing = tuple(f"{path}." for path, module in model.named_modules() if "Indexer" in type(module).__name__)
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{path}.{leaf}" if path else leaf
            number = re.match(re.escape(blocks) + r"\.(\d+)\.", name) if blocks else None
            layer = int(number[1]) if number else None
            trained = parameter.requires_grad and not f"{path}.".startswith(choosing)
            spec = ParamSpec(name, tuple(parameter.shape), "replicated", layer=layer, trained=trained)
            if path in vocabulary and parameter.shape[0] == model.get_input_embeddings().weight.shape[0]:
                yield _changed(spec, "vocab", Split(0))
                continue
            is_linear = leaf == "weight" and isinstance(module, nn.Linear | Conv1D)
            word = _word_for(words, name) or _word_for(words, path)
            kind, split = _split(spec, word, path, isinstance(module, Conv1D), sizes, own)
            yield _changed(spec, kind, split, linear=is_linear, conv=is_linear and isinstance(module, Conv1D))


def _changed(spec: ParamSpec, kind: Kind, split: Split | None, **more: Any) -> ParamSpec:
    return ParamSpec(spec.name, spec.shape, kind, split, layer=spec.layer, trained=spec.trained, **more)


def _split(
    spec: ParamSpec, word: str | None, path: str, conv: bool, sizes: Mapping[str, Any], own: Any
) -> tuple[Kind, Split | None]:
    """Kind and split of a parameter by the word for it or its module."""
    bias = spec.name.endswith("bias")
    last = len(spec.shape) - 1
    if word == SUMMED:
        return "summed", None
    if word in ROW_WORDS and not bias:
        return "row", Split(0 if conv else last)
    if word in COLUMN_WORDS:
        dim = last if bias or conv or last == 0 else last - 1
        if word == PACKED:
            return "column", Split(dim, (spec.shape[dim] // 2,) * 2)
        return "column", Split(dim, None, 1 if word == GATHERED else _grain(spec.shape[dim], path, sizes, own))
    return "replicated", None


def _grain(width: int, path: str, sizes: Mapping[str, Any], own: Any) -> int:
    """Columns of one head in a projection of an attention; 1 elsewhere, or where each head has one."""
    heads = sizes["num_attention_heads"]
    if not re.search(r"attn|attention", path) or not isinstance(heads, int):
        return 1
    key_heads, leaf = sizes["num_key_value_heads"], path.rpartition(".")[2]
    of_keys = isinstance(key_heads, int) and bool(re.fullmatch(r"[kv]_?(proj)?|key|value|[kv]_linear", leaf))
    if of_keys and width % key_heads == 0:
        return width // key_heads
    return width // heads if width % heads == 0 else sizes["head_dim"]


def _in_order(rows: Iterator[ParamSpec], embedding: str, norm: str | None, head: str) -> list[ParamSpec]:
    """Embedding, what else is before the blocks, the blocks, the last norm, the head; Hugging Face's order in each."""

    def place(spec: ParamSpec) -> tuple[int, int]:
        module = spec.name.rpartition(".")[0]
        if module == embedding:
            return 0, 0
        if spec.layer is not None:
            return 2, spec.layer
        return (4 if module == head else 3 if module == norm else 1), 0

    return sorted({spec.name: spec for spec in rows}.values(), key=place)
