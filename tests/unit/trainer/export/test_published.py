"""Weights in the form in which transformers publishes them, read and written: `save_pretrained` says what it is."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_json, tiny_recipe
from tests.unit.trainer.runs import VOCAB, fresh_model, write_run
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.anatomy.published import Making
from zeropipe.trainer.export.huggingface import export
from zeropipe.trainer.families.specs import parameter_table
from zeropipe.trainer.modeling.build import buffer_specs, build_model
from zeropipe.trainer.modeling.values import FolderValues, all_of
from zeropipe.trainer.plan.plan import make_plan
from zeropipe.trainer.ranks.ranks import Ranks
from zeropipe.trainer.recipe.recipe import Recipe

SIZES = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
EXPERTS = {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 16}  # 10 comes behind 2, not behind 1
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {  # and a name that is published and no parameter's
    "mixtral": ({"num_local_experts": 12}, "model.layers.0.block_sparse_moe.experts.3.w1.weight"),
    "qwen3_moe": ({**EXPERTS, "head_dim": 8}, "model.layers.1.mlp.experts.3.gate_proj.weight"),
    "deepseek_v3": (
        {**ROUTED, **LATENT, "n_group": 1, "topk_group": 1},
        "model.layers.1.mlp.experts.11.up_proj.weight",
    ),
    "exaone_moe": (
        {**EXPERTS, "is_moe_layer": [False, True], "mlp_layer_types": ["dense", "sparse"]},
        "model.layers.1.mlp.e_score_correction_bias",
    ),
    "granitemoe": ({"num_local_experts": 4}, "model.layers.0.block_sparse_moe.input_linear.weight"),
    "gpt_neox": ({}, "embed_out.weight"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def published(request, tmp_path_factory) -> tuple[dict[str, Any], Any, Path]:
    """A configuration, transformers' model of it, and the folder that transformers makes of that."""
    own, name = FAMILIES[request.param]
    config = {"model_type": request.param, **SIZES, **own}
    model, folder = fresh_model(config), tmp_path_factory.mktemp(request.param) / "folder"
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.copy_(torch.rand(buffer.shape))
    model.save_pretrained(folder)
    assert name in load_file(folder / "model.safetensors") and name not in model.state_dict()
    return config, model, folder


def test_a_published_folder_is_the_model_bit_for_bit(published):
    config, model, folder = published
    own, theirs = build_model(config, FolderValues(folder), 1, torch.float32, Ranks()), model.state_dict()
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor[tuple(map(slice, theirs[name].shape))], theirs[name]), name  # but for padded rows


def test_an_export_is_what_transformers_saves_bit_for_bit(published, text_store, tmp_path):
    config, model, folder = published
    done = export(write_run(tmp_path / "run", text_store, model, config), shard_bytes=30_000)
    ours: dict[str, torch.Tensor] = {}
    for file in done.folder.glob("*.safetensors"):
        ours |= load_file(file)
    theirs = load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype and torch.equal(tensor, ours[name]), name
    ids = torch.arange(12)[None]
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(done.folder).eval()
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("published", ["qwen3_moe"], indirect=True)
def test_of_a_stack_of_experts_those_are_read_that_are_asked_for(published, monkeypatch):
    config, model, folder = published
    read: list[str] = []
    original = Making.make

    def counted(self, get, rows=slice(None)):
        return original(self, lambda key: (read.append(key), get(key))[1], rows)

    values = FolderValues(folder)
    monkeypatch.setattr(Making, "make", counted)
    spec = next(spec for spec in parameter_table(config) if spec.name == "model.layers.1.mlp.experts.gate_up_proj")
    part = values(spec)[(slice(9, 11), slice(3, 20), slice(0, 5))]
    assert torch.equal(part, model.state_dict()[spec.name][9:11, 3:20, :5])
    assert sorted(read) == [
        f"model.layers.1.mlp.experts.{number}.{kind}_proj.weight" for number in (10, 9) for kind in ("gate", "up")
    ]


@pytest.mark.parametrize("published", ["exaone_moe"], indirect=True)
def test_buffers_are_read_under_their_published_names(published):
    config, model, folder = published
    for name, spec in buffer_specs(config).items():
        assert torch.equal(all_of(FolderValues(folder), spec), model.state_dict()[name])


@pytest.mark.parametrize("published", ["mixtral"], indirect=True)
@pytest.mark.parametrize(
    ("gone", "told"),
    [
        (r"layers\.0.*experts\.11\.", r"mlp\.experts\.\w+ has the shape \[11, 32, 48\]|has the shape \[11, 96, 32\]"),
        (
            r"layers\.0.*experts\.7\.w3",
            r"gate_up_proj cannot be made of 12 of .*w1.weight and 11 of .*w3.weight: .*file missing",
        ),
        (r"layers\.1.*experts", r"holds no parameter model\.layers\.1\.mlp\.experts\.gate_up_proj"),
    ],
)
def test_a_folder_that_lacks_experts_is_refused_by_the_plan(published, gone, told, tmp_path, text_store):
    _, _, folder = published
    weights = {key: t for key, t in load_file(folder / "model.safetensors").items() if not re.search(gone, key)}
    damaged = tmp_path / "folder"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(weights, damaged / "model.safetensors")
    with pytest.raises(UserError, match=told):
        plan_from(damaged, text_store, tmp_path)


@pytest.mark.parametrize("published", ["mixtral"], indirect=True)
def test_quantised_weights_are_refused(published, tmp_path, text_store):
    _, model, folder = published
    assert plan_from(folder, text_store, tmp_path).model_config["num_local_experts"] == 12
    model.config.quantization_config = {"quant_method": "fp8"}
    try:
        model.config.save_pretrained(tmp_path / "fp8")
    finally:
        del model.config.quantization_config
    with pytest.raises(UserError, match=r"config\.json: quantization_config: its weights are quantised \(fp8\)"):
        plan_from(tmp_path / "fp8", text_store, tmp_path)


def plan_from(folder: Path, store: Path, tmp_path: Path) -> Any:
    recipe = tiny_recipe(store, tmp_path / "run", model={"init": str(folder), "config": {}})
    return make_plan(Recipe.model_validate(recipe), tiny_json(), 1)
