"""A small version of a run: same family, objective, adapter, ZeRO stage, parallel sizes and JSON, on a few tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...data_prep.errors import UserError
from ...trainer.plan.model_config import pretrained_config
from ...trainer.plan.plan import make_plan
from ...trainer.plan.settings import read_settings
from ...trainer.recipe.recipe import Recipe, dump_recipe
from .faults import EVAL_EVERY, SAVE_EVERY

# sizes of the families of transformers, by its common names
SMALL_SIZES: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "global_head_dim": 16, "intermediate_size": 128, "ffn_dim": 128, "max_position_embeddings": 64,
    "sliding_window": 16, "word_embed_proj_dim": 64, "rotary_dim": 8, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "top_k_experts": 2, "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32, "shared_expert_intermediate_size": 32, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 4,
    "mamba_d_head": 32, "mamba_d_ssm": 128, "mamba_n_groups": 1, "mamba_chunk_size": 16, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "pad_token_id": None,
    "attention_types": [[["global", "local"], 1]], "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 512, "laurel_rank": 8,
}  # fmt: skip
FOR_EVER = 100_000  # steps
_TEXT_TOKENS, _RECORD_TOKENS = 32, 128
_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def small_sizes(model_type: str, **others: int) -> dict[str, Any]:
    """Of the sizes above, with others of these names, those that a family knows, by its own names."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]
    own = set(getattr(config, "__dataclass_fields__", ())) | set(dir(config)) | set(config.attribute_map)
    own -= {key for key in own if isinstance(found := getattr(config, key, None), property) and found.fset is None}
    sizes = {**SMALL_SIZES, **others}
    if "qk_rope_head_dim" in own:  # latent attention: a key and value for every head, whose size follows
        own.discard("head_dim")
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return {config.attribute_map.get(key, key): value for key, value in sizes.items() if key in own}


def write_small(recipe: Recipe, ds: Mapping[str, Any], hosts: int, folder: Path) -> int:
    """Writes `recipe.yaml` and `deepspeed.json` of the small version, with `run` as its run directory, into a folder.

    Returns the slots of each host.

    Raises:
        UserError: the family has no small version that can be planned; says why.
    """
    stated = read_settings(ds)
    shared = recipe.parallel.pipeline * stated.tensor * stated.sequence
    slots = shared // math.gcd(hosts, shared)
    json_file = {key: value for key, value in ds.items() if key not in _BATCH_KEYS}
    small = _small_recipe(recipe, hosts * slots // shared, folder / "run")
    try:
        make_plan(small, json_file, hosts * slots)
    except UserError as error:
        raise UserError(f"{recipe.name}: its small version cannot be run on {hosts} hosts: {error}") from None
    (folder / "recipe.yaml").write_text(dump_recipe(small), encoding="utf-8")
    (folder / "deepspeed.json").write_text(json.dumps(json_file, indent=1), encoding="utf-8")
    return slots


def _small_recipe(recipe: Recipe, replicas: int, output: Path) -> Recipe:
    values = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    objective = recipe.objective if isinstance(recipe.objective, str) else recipe.objective["type"]
    seq_len = min(recipe.data.seq_len, _TEXT_TOKENS if objective == "causal_lm" else _RECORD_TOKENS)
    values |= {
        "name": recipe.name,
        "output": str(output),
        "model": {"config": _small_model(recipe, seq_len)},
        "batch": {"global": replicas * 4 * recipe.parallel.pipeline},
        "duration": {"steps": FOR_EVER},
        "log": {"every": 1, "sinks": []},
        "save": {**values.get("save", {}), "every": SAVE_EVERY, "keep": 3, "milestone": None},
        "compile": "none",
        "resume": "auto",
    }
    values["data"] = {**_absolute(values["data"]), "seq_len": seq_len}
    evaluated = recipe.data.valid is not None or recipe.data.shares[1] > 0
    values["eval"] = {"every": EVAL_EVERY if evaluated else 0, "batches": 1}
    values["parallel"] = {**values.get("parallel", {}), "patience": 5.0}
    if recipe.tokenizer is not None:
        values["tokenizer"] = str(Path(recipe.tokenizer).absolute())
    return Recipe.model_validate(values)


def _small_model(recipe: Recipe, seq_len: int) -> dict[str, Any]:
    init = recipe.model.init
    config = dict(recipe.model.config) if init == "random" else pretrained_config(Path(init))
    layers = max(2, recipe.parallel.pipeline)
    positions = max(64, seq_len)
    sizes = small_sizes(config["model_type"], num_hidden_layers=layers, max_position_embeddings=positions)
    unlisted = {key: value for key, value in config.items() if not _of_the_folder(key)}
    lists = {key: value[:layers] for key, value in unlisted.items() if isinstance(value, list) and len(value) > layers}
    return {**unlisted, **lists, **sizes}


def _of_the_folder(key: str) -> bool:
    """What a folder's config.json says that is not the model's shape, or follows from the data."""
    return key in ("architectures", "transformers_version", "dtype", "torch_dtype", "vocab_size", "_name_or_path")


def _absolute(data: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(data)
    for key in ("train", "valid", "test"):
        if data.get(key):
            found[key] = [{**item, "store": str(Path(item["store"]).absolute())} for item in data[key]]
    return found
