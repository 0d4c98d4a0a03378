"""The model's configuration, complete, from the recipe, a pretrained folder and the stores. Needs no transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...data_prep.errors import UserError
from ..families.specs import TABLES, parameter_table
from ..recipe.recipe import Recipe
from ..recipe.text_files import did_you_mean, parse_json, read_text, words

# transformers takes any key without a word, and ignores those it does not know
_COMMON = words(
    """
    model_type vocab_size bos_token_id eos_token_id pad_token_id tie_word_embeddings initializer_range use_cache
    architectures dtype torch_dtype transformers_version _name_or_path id2label label2id return_dict
    output_hidden_states output_attentions is_encoder_decoder problem_type chunk_size_feed_forward
    """
)
_GPT2 = words(
    """
    n_layer n_embd n_head n_inner n_positions activation_function attn_pdrop embd_pdrop resid_pdrop layer_norm_epsilon
    scale_attn_weights scale_attn_by_inverse_layer_idx reorder_and_upcast_attn add_cross_attention summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    """
)
_GPT2_ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
_LLAMA = words(
    """
    hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act
    max_position_embeddings rms_norm_eps rope_parameters rope_theta rope_scaling attention_bias attention_dropout
    mlp_bias pretraining_tp
    """
)


@dataclass(frozen=True)
class Family:
    """What planning must know of a model family beyond its parameter table."""

    keys: frozenset[str]
    aliases: Mapping[str, str]  # other spellings that transformers takes
    positions: tuple[str, int]  # key of the longest sequence, and its default
    layers: tuple[str, int]
    heads: tuple[str, int]
    width: tuple[str, int]


FAMILIES: Mapping[str, Family] = {
    "gpt2": Family(
        keys=_COMMON | _GPT2,
        aliases=_GPT2_ALIASES,
        positions=("n_positions", 1024),
        layers=("n_layer", 12),
        heads=("n_head", 12),
        width=("n_embd", 768),
    ),
    "llama": Family(
        keys=_COMMON | _LLAMA,
        aliases={},
        positions=("max_position_embeddings", 2048),
        layers=("num_hidden_layers", 32),
        heads=("num_attention_heads", 32),
        width=("hidden_size", 4096),
    ),
}


def resolve_model(recipe: Recipe, vocab: int | None, eod: int | None) -> dict[str, Any]:
    """The model's configuration with vocab_size (no padding) and the ids of the end-of-document token.

    Args:
        vocab, eod: what the stores say of their vocabulary; None where they say nothing.

    Raises:
        UserError: unknown keys, a pretrained folder that cannot be read or has another shape, or a vocabulary that does
            not match the stores.
    """
    base = pretrained_config(Path(recipe.model.init)) if recipe.model.init != "random" else {}
    own = recipe.model.config
    _known_to_transformers(own.get("model_type") or base["model_type"])
    config = {**base, **_checked(own, own.get("model_type") or base["model_type"])}
    _vocabulary(config, vocab, pretrained=bool(base))
    if eod is not None and not base:
        config = {"bos_token_id": eod, "eos_token_id": eod, **config}
    if base:
        _same_shapes(recipe.model.init, base, config)
    if config["model_type"] in FAMILIES:
        _shape_is_possible(config)
    return config


def config_value(config: Mapping[str, Any], key: tuple[str, int]) -> int:
    """A size of the model: stated, or transformers' default."""
    value = config.get(key[0])
    return key[1] if value is None else value


def longest_sequence(config: Mapping[str, Any]) -> int | None:
    """Longest sequence that the model takes; None where that is not known."""
    if family := FAMILIES.get(config["model_type"]):
        return config_value(config, family.positions)
    return config.get("max_position_embeddings") or config.get("n_positions")


def pretrained_config(folder: Path) -> dict[str, Any]:
    """The configuration of a Hugging Face folder, or of the newest checkpoint of a run directory.

    Raises:
        UserError: neither is there, or the folder has no safetensors.
    """
    if not folder.is_dir():
        raise UserError(f"model.init: {folder}: no such folder; state random, a Hugging Face folder or a run")
    if (path := folder / "config.json").is_file():
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"model.init: {folder}: holds no *.safetensors; other formats of weights are not read")
        config = parse_json(read_text(path), str(path))
        if not isinstance(config, dict) or "model_type" not in config:
            raise UserError(f"{path}: not a transformers configuration: model_type is missing")
        return config
    states = sorted((*folder.glob("state.json"), *folder.glob("step-*/state.json")))
    states += sorted(folder.glob("checkpoints/step-*/state.json"))
    for path in reversed(states):
        if (path.parent / "manifest.json").is_file():
            return json.loads(read_text(path))["model_config"]
    raise UserError(f"model.init: {folder}: no config.json (Hugging Face) and no checkpoints/step-* (a run) in it")


def _known_to_transformers(model_type: Any) -> None:
    """Refuses a misspelt family, where transformers is installed: it has a folder for each, some for several."""
    found = find_spec("transformers")
    if not isinstance(model_type, str):
        raise UserError(f"model.config.model_type: must be text, got {model_type!r}")
    if found is None or found.origin is None or model_type in FAMILIES:
        return
    folders = [entry.name for entry in (Path(found.origin).parent / "models").iterdir() if entry.is_dir()]
    if not any(model_type.replace("-", "_").startswith(folder) for folder in folders):
        raise UserError(
            f"model.config.model_type: transformers has no {model_type!r}"
            + (did_you_mean(model_type, FAMILIES) or did_you_mean(model_type, folders))
        )


def _checked(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The stated configuration in the family's own spelling."""
    family = FAMILIES.get(model_type)
    if family is None:
        return dict(config)
    known = family.keys | set(family.aliases)
    problems = [f"model.config.{key}: unknown key{did_you_mean(key, known)}" for key in config if key not in known]
    problems += [
        f"model.config.{key} and {family.aliases[key]} are two names of one size; keep one"
        for key in config
        if family.aliases.get(key) in config
    ]
    if problems:
        raise UserError("; ".join(problems))
    return {family.aliases.get(key, key): value for key, value in config.items()}


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


def _same_shapes(folder: str, base: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """A key in model.config may change how a pretrained model is trained (dropout), not its shape."""
    if base["model_type"] != config["model_type"]:
        raise UserError(f"model.config.model_type is {config['model_type']!r}, {folder} holds {base['model_type']!r}")
    if config["model_type"] not in TABLES:
        return
    before = [(spec.name, spec.shape) for spec in parameter_table(base)]
    after = [(spec.name, spec.shape) for spec in parameter_table(config)]
    if before != after:
        keys = ", ".join(sorted(key for key in config if config[key] != base.get(key)))
        raise UserError(f"model.config changes the shape of the weights in {folder}; take it out of: {keys}")


def _shape_is_possible(config: Mapping[str, Any]) -> None:
    family = FAMILIES[config["model_type"]]
    sizes = {key[0]: config_value(config, key) for key in (family.positions, family.layers, family.heads, family.width)}
    for key, value in {**sizes, "vocab_size": config["vocab_size"]}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"model.config.{key}: must be a positive whole number, got {value!r}")
    heads, width = sizes[family.heads[0]], sizes[family.width[0]]
    if width % heads and not config.get("head_dim"):
        fits = ", ".join(str(n) for n in range(1, min(width, 256) + 1) if width % n == 0)
        raise UserError(
            f"model.config.{family.heads[0]} {heads} does not divide {family.width[0]} {width}; numbers that do: {fits}"
        )
    kv_heads = config.get("num_key_value_heads")
    if kv_heads and heads % kv_heads:
        raise UserError(f"model.config.num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
