"""What belongs to a model's weights and is not trained (what balances experts): read, kept, saved, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests import tiny
from tests.harness import run_ranks
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.anatomy.skeleton import skeleton
from zeropipe.trainer.checkpoint.reader import Checkpoint
from zeropipe.trainer.export.huggingface import export, read_probe
from zeropipe.trainer.export.load import load_model

pytestmark = pytest.mark.distributed

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "max_position_embeddings": 64,
    "vocab_size": tiny.VOCAB,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GLM = {"model_type": "glm4_moe", "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 0}
ERNIE = {"model_type": "ernie4_5_moe", "moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 0}
BF16 = {"bf16": {"enabled": True}}
LORA = {"adapter": {"type": "lora", "r": 2, "targets": ["q_proj"]}}
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any], dict[str, Any]]] = {
    "buffer-zero3-bf16": (GLM, "zero3", BF16, {}),
    "buffer-pp2": (GLM, "zero1", {}, {"parallel": {"pipeline": 2}}),
    "buffer-lora": (GLM, "zero1", {}, LORA),
    "frozen-zero2": (ERNIE, "zero2", {}, {}),
}


def folder_of(config: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """A Hugging Face folder whose biases send tokens to other experts than none would; the biases by name."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES, **config))
    biases = {name: t for name, t in model.state_dict().items() if name.endswith("e_score_correction_bias")}
    for bias in biases.values():
        bias.copy_(torch.rand(bias.shape))
    model.config.save_pretrained(path)
    # with whole stacks of experts; `save_pretrained` takes them apart (test_published.py)
    save_file({name: t.clone() for name, t in model.state_dict().items()}, path / "model.safetensors", {"format": "pt"})
    return {name: bias.clone() for name, bias in biases.items()}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case == "buffer-pp2" else ()) for case in CASES]
)
def test_a_run_goes_on_with_what_the_folder_holds(case, tmp_path):
    config, zero, ds, sections = CASES[case]
    store, run = tiny.tiny_store(tmp_path / "store"), tmp_path / "run"
    biases = folder_of(config, tmp_path / "folder")
    assert len(biases) == 2
    still = {"optimizer": {"lr": 1e-12, "weight_decay": 0.5}, "schedule": {"type": "constant", "warmup": 0}}
    own = {"model": {"init": str(tmp_path / "folder"), "config": {}}, "duration": {"steps": 2}, **still, **sections}
    run_ranks(2, tiny._train, tiny.tiny_recipe(store, run, **own), tiny.tiny_json(zero, **ds))

    ids, logits = read_probe(Checkpoint.open(run).path)  # type: ignore[misc]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype="bfloat16" if ds else "float32")
        expected = theirs.eval()(input_ids=ids).logits.float()
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-2 if ds else 1e-5)
    exported = AutoModelForCausalLM.from_pretrained(export(run).folder).state_dict()
    loaded, checkpoint = load_model(run)[0].state_dict(), Checkpoint.open(run)
    for name, bias in biases.items():
        assert "adapter" in sections or checkpoint.kinds(name) == ["master"], "it is trained"
        assert torch.equal(exported[name], bias) and torch.equal(loaded[name], bias)


def test_a_run_resumes_with_them_on_another_layout(tmp_path):
    store, run = tiny.tiny_store(tmp_path / "store"), tmp_path / "run"
    biases = folder_of(GLM, tmp_path / "folder")
    recipe = tiny.tiny_recipe(store, run, model={"init": str(tmp_path / "folder"), "config": {}})
    constant = {"schedule": {"type": "constant", "warmup": 0}}
    first = {**recipe, **constant, "duration": {"steps": 2}, "parallel": {"pipeline": 2}}
    run_ranks(2, tiny._train, first, tiny.tiny_json("zero1"))
    run_ranks(2, tiny._train, {**recipe, **constant, "duration": {"steps": 3}}, tiny.tiny_json("zero3"))
    checkpoint = Checkpoint.open(run)
    assert checkpoint.step == 3
    for name, bias in biases.items():
        assert checkpoint.kinds(name) == ["master"] and torch.equal(checkpoint.read(name), bias)


def test_what_checkpoints_have_no_place_for_is_refused():
    with pytest.raises(UserError, match=r"weights have model\.layers\.0\..*tid2eid of int64: not done here"):
        skeleton({"model_type": "deepseek_v4", "num_hidden_layers": 1})
