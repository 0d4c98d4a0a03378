"""The model's configuration, complete, from the recipe, a pretrained folder and the stores. Needs no transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...data_prep.errors import UserError
from ..families.declared import declared_default, declared_keys, declared_parts, folders_for, model_folders
from ..families.derived import Derived
from ..families.family import COMMON, Family
from ..families.overrides import UNTRAINED
from ..families.registry import FAMILIES, family_of
from ..families.specs import parameter_table
from ..families.weight_files import WeightFiles, refuse_own_code, refuse_quantised
from ..recipe.recipe import Recipe
from ..recipe.text_files import did_you_mean, parse_json, read_text

# weights of what mixtures of experts add to the loss for their routers
_AUXILIARY = ("router_aux_loss_coef", "aux_loss_alpha", "router_z_loss_coef")
_SIZES = ("max_position_embeddings", "num_hidden_layers", "num_attention_heads", "hidden_size")  # standard names


def resolve_model(recipe: Recipe, vocab: int | None, eod: int | None) -> dict[str, Any]:
    """The model's configuration with vocab_size (no padding) and the ids of the end-of-document token.

    Args:
        vocab, eod: what the stores say of their vocabulary; None where they say nothing.

    Raises:
        UserError: unknown keys, a pretrained folder that cannot be read, lacks a weight or has another shape, or a
            vocabulary that does not match the stores.
    """
    base = pretrained_config(Path(recipe.model.init)) if recipe.model.init != "random" else {}
    own = recipe.model.config
    _known_to_transformers(own.get("model_type") or base["model_type"])
    config = {**base, **_checked(own, own.get("model_type") or base["model_type"])}
    _refuse_auxiliary(own, config)
    _vocabulary(config, vocab, pretrained=bool(base))
    if eod is not None and not base:
        config = {"bos_token_id": eod, "eos_token_id": eod, **config}
    _padding(config, pretrained=bool(base))
    if base:
        _same_shapes(recipe.model.init, base, config)
        _check_weights(Path(recipe.model.init), config)
    if isinstance(family := family_of(config), Family):
        _shape_is_possible(config, family)
    elif family is not None:
        _heads_fit(family)
    return config


def longest_sequence(config: Mapping[str, Any]) -> int | None:
    """Longest sequence that the model takes; None where that is not known."""
    if family := family_of(config):
        return family.value(config, "max_position_embeddings")
    return config.get("max_position_embeddings") or config.get("n_positions")


def pretrained_config(folder: Path) -> dict[str, Any]:
    """The configuration of a Hugging Face folder, or of the newest checkpoint of a run directory.

    Raises:
        UserError: neither is there.
    """
    if not folder.is_dir():
        raise UserError(f"model.init: {folder}: no such folder; state random, a Hugging Face folder or a run")
    if (path := folder / "config.json").is_file():
        config = parse_json(read_text(path), str(path))
        if not isinstance(config, dict) or "model_type" not in config:
            raise UserError(f"{path}: not a transformers configuration: model_type is missing")
        refuse_own_code(config, path)
        refuse_quantised(config, path)
        return config
    states = sorted((*folder.glob("state.json"), *folder.glob("step-*/state.json")))
    states += sorted(folder.glob("checkpoints/step-*/state.json"))
    for path in reversed(states):
        if (path.parent / "manifest.json").is_file():
            return json.loads(read_text(path))["model_config"]
    raise UserError(f"model.init: {folder}: no config.json (Hugging Face) and no checkpoints/step-* (a run) in it")


def _known_to_transformers(model_type: Any) -> None:
    """Refuses a misspelt family, where transformers is installed: it has a folder for each, some for several; and those
    that cannot be trained.
    """
    if not isinstance(model_type, str):
        raise UserError(f"model.config.model_type: must be text, got {model_type!r}")
    folders = model_folders()
    if folders and model_type not in FAMILIES and not folders_for(model_type) and not _registered(model_type):
        raise UserError(
            f"model.config.model_type: transformers has no {model_type!r}"
            + (did_you_mean(model_type, FAMILIES) or did_you_mean(model_type, folders))
        )
    if model_type in UNTRAINED:
        raise UserError(f"model.config.model_type {model_type!r} is not trained here: {UNTRAINED[model_type]}")
    if parts := declared_parts(model_type):
        text = f"{model_type}_text"
        cure = f"train its model of texts, {text!r}" if declared_keys(text) else "use a family of texts alone"
        raise UserError(f"model.config.model_type {model_type!r} is of several models ({', '.join(parts)}); {cure}")


def _registered(model_type: str) -> bool:
    """Whether somebody has registered a configuration class of this name with transformers in this process."""
    return "transformers" in sys.modules and model_type in sys.modules["transformers"].CONFIG_MAPPING


def _checked(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The stated configuration in the family's own spelling. transformers ignores unknown keys without a word."""
    family = FAMILIES.get(model_type)
    aliases = family.aliases if family else {}
    known = family.keys | set(aliases) if family else declared_keys(model_type)
    problems = [] if known is None else [_unknown(key, known | COMMON) for key in config if key not in known | COMMON]
    problems += [
        f"model.config.{key} and {aliases[key]} are two names of one size; keep one"
        for key in config
        if aliases.get(key) in config
    ]
    if problems:
        raise UserError("; ".join(problems))
    return {aliases.get(key, key): value for key, value in config.items()}


def _unknown(key: str, known: frozenset[str]) -> str:
    """An unknown key, with the name that this family has for what another calls so, or else the nearest one."""
    elsewhere = (standard for name in FAMILIES for standard, own in FAMILIES[name].aliases.items() if own == key)
    meant = next((standard for standard in elsewhere if standard in known), None)
    return f"model.config.{key}: unknown key" + (f", did you mean {meant!r}?" if meant else did_you_mean(key, known))


def _refuse_auxiliary(own: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuses transformers' own auxiliary loss of a router where somebody counts on it: it is a product of means over a
    batch, which changes with every split of the batch. That of `model.router` does not.
    """
    stated = [key for key in _AUXILIARY if own.get(key)]
    if config.get("output_router_logits"):
        stated.append("output_router_logits")
    for key in stated:
        off = "false" if key == "output_router_logits" else "0, or leave it out"
        raise UserError(
            f"model.config.{key}: transformers' auxiliary loss of a router is a product of means over a batch, which "
            f"changes with the layout; set it to {off}, and state model.router."
            f"{'z_loss' if 'z_loss' in key else 'aux_loss'}, whose loss does not"
        )


def _vocabulary(config: dict[str, Any], vocab: int | None, pretrained: bool) -> None:
    ours = config.get("vocab_size")
    if ours is None and vocab is None:
        raise UserError("model.config.vocab_size: missing, and the stores (bare Megatron prefixes) do not record it")
    if ours is None or vocab is None:
        config["vocab_size"] = ours or vocab
    elif ours < vocab:
        raise UserError(
            f"model.config.vocab_size is {ours}, the store's tokenizer has {vocab} tokens; "
            + ("prepare the data with the tokenizer of the model" if pretrained else f"leave it out or state {vocab}")
        )
    elif ours > vocab and not pretrained:  # pretrained models are often padded beyond their tokenizer
        raise UserError(
            f"model.config.vocab_size is {ours}, the store's tokenizer has {vocab} tokens; leave it out: the padding "
            "to a multiple of 128 is added when training and taken off at export"
        )


def _padding(config: dict[str, Any], pretrained: bool) -> None:
    """The padding token is one of the vocabulary, and its embedding is never trained. A model that begins at random has
    none: transformers' default is of another tokenizer.
    """
    default = declared_default(config["model_type"], "pad_token_id")
    if not pretrained and default is not None:
        config.setdefault("pad_token_id", None)
    pad, vocab = config.get("pad_token_id"), config["vocab_size"]
    if pad is not None and (isinstance(pad, bool) or not isinstance(pad, int) or pad >= vocab):
        raise UserError(f"model.config.pad_token_id: must be a token below vocab_size {vocab}, or null; got {pad!r}")


def _same_shapes(folder: str, base: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """A key in model.config may change how a pretrained model is trained (dropout), not its shape."""
    if base["model_type"] != config["model_type"]:
        raise UserError(f"model.config.model_type is {config['model_type']!r}, {folder} holds {base['model_type']!r}")
    if family_of(config) is None:
        return
    before = [(spec.name, spec.shape) for spec in parameter_table(base)]
    after = [(spec.name, spec.shape) for spec in parameter_table(config)]
    if before != after:
        keys = ", ".join(sorted(key for key in config if config[key] != base.get(key)))
        raise UserError(f"model.config changes the shape of the weights in {folder}; take it out of: {keys}")


def _check_weights(folder: Path, config: Mapping[str, Any]) -> None:
    """What a folder's weights lack is found by the plan, and by every rank alike."""
    if (folder / "config.json").is_file():
        files, family = WeightFiles(folder), family_of(config)
        if isinstance(family, Family):
            files.check(parameter_table(config))
        elif family is not None:
            files.check(parameter_table(config), _made(config, files))


def _made(config: Mapping[str, Any], files: WeightFiles) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that transformers makes of a folder's tensors."""
    from ..anatomy.published import as_loaded
    from ..anatomy.skeleton import skeleton

    makings = as_loaded(skeleton(config), files.shapes, f"model.init: {files.folder}")
    return {name: shape for name, (_, shape) in makings.items()}


def _heads_fit(family: Derived) -> None:
    heads, keys = family.sizes["num_attention_heads"], family.sizes["num_key_value_heads"]
    if isinstance(heads, int) and isinstance(keys, int) and keys and heads % keys:
        raise UserError(
            f"model.config.num_key_value_heads: {keys} (the family's default, where it is not stated) does not divide "
            f"the {heads} heads; state a number that does"
        )


def _shape_is_possible(config: Mapping[str, Any], family: Family) -> None:
    sizes = {name: family.value(config, name) for name in (*_SIZES, "vocab_size")}
    for name, value in sizes.items():
        key = family.key(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"model.config.{key}: must be a positive whole number, got {value!r}")
    heads, width = sizes["num_attention_heads"], sizes["hidden_size"]
    if width % heads and not config.get("head_dim"):
        fits = ", ".join(str(n) for n in range(1, min(width, 256) + 1) if width % n == 0)
        raise UserError(
            f"model.config.{family.key('num_attention_heads')} {heads} does not divide {family.key('hidden_size')} "
            f"{width}; numbers that do: {fits}"
        )
    kv_heads = config.get("num_key_value_heads")
    if kv_heads and heads % kv_heads:
        raise UserError(f"model.config.num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
