"""Families that nobody has written down train on every layout as plain transformers does, from transformers' plans."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.distributed.test_parity import DEFECTS
from tests.harness import run_ranks
from tests.toys.declared import NAME
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.checkpoint.reader import Checkpoint
from zeropipe.trainer.export.huggingface import export
from zeropipe.trainer.families.derived import Derived
from zeropipe.trainer.families.registry import family_of
from zeropipe.trainer.plan.layout import Layout
from zeropipe.trainer.recipe.recipe import Recipe
from zeropipe.trainer.testing.parity import Bounds, compare, plan_in, verdict
from zeropipe.trainer.testing.plain import Curve

pytestmark = pytest.mark.distributed

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
WINDOW = {"head_dim": 16, "sliding_window": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 16},
    "mistral": {**GROUPED, "sliding_window": 16},
    "gemma2": {**GROUPED, **WINDOW},
    "gemma3_text": {**GROUPED, **WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": GROUPED,
    "olmo2": GROUPED,
    "smollm3": GROUPED,
    "gpt_neox": SIZES,
    "starcoder2": GROUPED,
    "granite": {**GROUPED, "logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "glm4": {**GROUPED, "head_dim": 16},
    "cohere2": {**GROUPED, "sliding_window": 16},
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "qwen3_moe": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
}
LAYOUTS = {
    "zero1": Layout(world=2, data=2, zero_stage=1),
    "zero2": Layout(world=2, data=2, zero_stage=2),
    "zero3": Layout(world=2, data=2, zero_stage=3),
    "tp2": Layout(world=2, data=1, tensor=2, zero_stage=1),
    "tp2-zero3": Layout(world=4, data=2, tensor=2, zero_stage=3),
    "pp2": Layout(world=2, data=1, pipeline=2, zero_stage=1),
    "sp2": Layout(world=2, data=1, sequence=2, zero_stage=2),
    "sp2-zero3": Layout(world=2, data=1, sequence=2, zero_stage=3),
    "tp2-pp2": Layout(world=4, data=1, tensor=2, pipeline=2, zero_stage=1),
    "tp2-sp2": Layout(world=4, data=1, tensor=2, sequence=2, zero_stage=1),
}
ONE = Layout(world=1, data=1, zero_stage=0)
# each kind of word in a plan, each way to a head, each kind of mask is there once on the layout that it matters for
SAMPLE = [
    ("qwen2", "pp2"), ("qwen3", "tp2"), ("mistral", "sp2"), ("gemma2", "tp2"), ("gemma3_text", "pp2"), ("phi3", "tp2"),
    ("olmo2", "tp2"), ("gpt_neox", "tp2"), ("granite", "pp2"), ("cohere2", "sp2-zero3"), ("glm4", "tp2"),
    ("mixtral", "tp2"),
]  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tiny.tiny_store(tmp_path_factory.mktemp("derived") / "store")


def recipe_for(name: str, store: Path, config: dict[str, Any]) -> Recipe:
    model = {"config": {"model_type": name, **config}}
    return Recipe.model_validate({**tiny.tiny_recipe(store, store.parent / "run"), "model": model})


# what runs on ranks is of this module, so that importing it there registers the toy
def _truth(plan) -> Curve:
    from zeropipe.trainer.testing.curves import one_process

    return one_process(plan)


def _curve(plan) -> Curve:
    from zeropipe.trainer.testing.curves import of_layout

    return of_layout(plan)


def assert_follows(recipe: Recipe, layouts: list[Layout], steps: int) -> None:
    [truth] = run_ranks(1, _truth, plan_in(recipe, tiny.tiny_json(), ONE, steps), timeout=600)
    for layout in layouts:
        plan = plan_in(recipe, tiny.tiny_json(), layout, steps)
        found = compare(plan, run_ranks(layout.world, _curve, plan, timeout=600)[0], truth, Bounds())
        assert found.difference is None, f"{layout}: {found}"


@pytest.mark.parametrize(("name", "layout"), SAMPLE)
def test_a_sample_follows_plain_transformers(name, layout, store):
    assert_follows(recipe_for(name, store, FAMILIES[name]), [LAYOUTS[layout]], 2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_layout_follows_plain_transformers(name, store):
    assert_follows(recipe_for(name, store, FAMILIES[name]), list(LAYOUTS.values()), 20)


def test_a_family_from_a_configuration_class_and_its_plans_needs_no_code(store):
    """One that transformers does not have: `tests/toys/declared.py` is its configuration class and its model."""
    family = family_of({"model_type": NAME, "vocab_size": 500, **GROUPED})
    assert isinstance(family, Derived) and family.refusals.keys() == {"expert"}  # of which it has none
    assert_follows(recipe_for(NAME, store, GROUPED), [LAYOUTS["tp2-pp2"], LAYOUTS["sp2"]], 2)


def _spoil(**words: str) -> None:
    from transformers import Qwen3Config

    plan = Qwen3Config.base_model_tp_plan
    for name, word in words.items():
        plan[f"layers.*.self_attn.{name}"] = word


def _norms_called_replicated() -> None:
    _spoil(q_norm="local_params")


def test_a_norm_of_heads_called_replicated_is_found_by_name(store):
    recipe = recipe_for("qwen3", store, FAMILIES["qwen3"])
    [truth] = run_ranks(1, _truth, plan_in(recipe, tiny.tiny_json(), ONE, 2), timeout=600)
    plan = plan_in(recipe, tiny.tiny_json(), LAYOUTS["tp2"], 2)
    found = verdict(plan, truth, Bounds(), _norms_called_replicated)
    assert str(found.difference).startswith(
        "step 1: ranks hold unlike copies of model.layers.0.self_attn.q_norm.weight"
    )
    assert "qwen3's model.layers.0.self_attn.q_norm.weight is the first apart" in str(found.difference)


def _packed_called_column() -> None:
    from transformers import MixtralConfig

    MixtralConfig.base_model_tp_plan["layers.*.mlp.experts.gate_up_proj"] = "colwise"


def test_a_packed_projection_called_column_is_found_by_name(store):
    """Every shape fits: a rank has the gate of the one half and the other has what it gates."""
    recipe = recipe_for("mixtral", store, FAMILIES["mixtral"])
    [truth] = run_ranks(1, _truth, plan_in(recipe, tiny.tiny_json(), ONE, 2), timeout=600)
    found = verdict(plan_in(recipe, tiny.tiny_json(), LAYOUTS["tp2"], 2), truth, Bounds(), _packed_called_column)
    named = r"step 1: (loss|gradient norm) .*; mixtral's model\.layers\.\d\.mlp\.\S+ is the first apart"
    assert re.match(named, str(found.difference)), found.difference


# the others are of the engine, which does not ask what it trains
FAST = ("_tied_gradient_not_summed", "_same_dropout_masks")


@pytest.fixture(scope="module")
def sharp(tmp_path_factory) -> tuple[Recipe, Curve]:
    """A recipe that shows every planted defect within four steps, as that of the parity tests, and its truth."""
    folder = tmp_path_factory.mktemp("sharp")
    sections = tiny.tiny_recipe(
        tiny.tiny_store(folder / "store"),
        folder / "run",
        data={"document_mask": True},
        schedule={"type": "constant", "warmup": 0},
        optimizer={"lr": 1e-2},
    )
    model = {"config": {"model_type": "qwen3", **FAMILIES["qwen3"], "tie_word_embeddings": True}}
    recipe = Recipe.model_validate({**sections, "model": model})
    [truth] = run_ranks(1, _truth, plan_in(recipe, tiny.tiny_json(), ONE, 4), timeout=600)
    assert min(truth.norms) > 0.3, "clipping at 0.3 must be at work"
    return recipe, truth


def _of_a_suite(defect: Any) -> Any:
    marks = [] if defect.__name__ in FAST else [pytest.mark.slow]
    return pytest.param(defect, marks=marks, id=defect.__name__.strip("_"))


@pytest.mark.parametrize("defect", map(_of_a_suite, DEFECTS))
def test_planted_defects_turn_the_gate_red(defect, sharp):
    (recipe, truth), (layout, expected) = sharp, DEFECTS[defect]
    found = verdict(plan_in(recipe, tiny.tiny_json(), layout, 4), truth, Bounds(), defect)
    assert re.match(expected, str(found.difference)), found.difference


def _plan_refused(store: Path) -> str:
    _spoil(q_proj="rowwise")
    recipe = recipe_for("qwen3", store, FAMILIES["qwen3"])
    with pytest.raises(UserError) as refused:
        plan_in(recipe, tiny.tiny_json(), LAYOUTS["tp2"], 2)
    return str(refused.value)


def test_a_column_called_row_is_refused_before_the_launch(store):
    [said] = run_ranks(1, _plan_refused, store, timeout=600)
    assert "'qwen3': split as transformers says, layers.0.self_attn.q_proj fails" in said


def test_what_transformers_declares_nothing_of_is_refused_with_the_reason(store):
    config = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 128}
    recipe = recipe_for("opt", store, {**config, "max_position_embeddings": 64, "word_embed_proj_dim": 64})
    with pytest.raises(UserError, match=r"'opt': transformers declares no split of it \(base_model_tp_plan\)"):
        plan_in(recipe, tiny.tiny_json(), LAYOUTS["tp2"], 2)
    with pytest.raises(UserError, match=r"'opt': transformers declares no pipeline of it \(base_model_pp_plan\)"):
        plan_in(recipe, tiny.tiny_json(), LAYOUTS["pp2"], 2)


def _run(recipe: dict[str, Any], ds: dict[str, Any]) -> int:
    return tiny._train(recipe, ds)


@pytest.mark.parametrize("name", ["gemma2", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_a_run_goes_from_layout_to_layout_and_is_exported_and_read_again(name, store, tmp_path):
    """Saved, on to another layout, exported: bitwise what plain transformers loads; and a new run begins there."""
    tensor = {"tensor_parallel": {"autotp_size": 2}}
    sections = {"model": {"config": {"model_type": name, **FAMILIES[name]}}, "save": {"every": 2}}

    def recipe(steps: int, stages: int = 1, folder: str = "run", init: str | None = None) -> dict[str, Any]:
        made = tiny.tiny_recipe(store, tmp_path / folder, **{key: sections[key] for key in ("save",)})
        made["model"] = sections["model"] if init is None else {"init": init}
        return {**made, "duration": {"steps": steps}, "parallel": {"pipeline": stages}}

    run_ranks(2, _run, recipe(2), tiny.tiny_json("zero3"), timeout=600)
    run_ranks(4, _run, recipe(4, 2), tiny.tiny_json("zero1", **tensor), timeout=600)
    done = export(tmp_path / "run", shard_bytes=100_000)
    assert done.step == 4 and done.deviation is not None and done.deviation <= 1e-5
    assert sum(file.endswith(".safetensors") for file in done.files) > 1
    model, checkpoint = AutoModelForCausalLM.from_pretrained(done.folder), Checkpoint.open(tmp_path / "run")
    for key, weight in model.named_parameters():
        assert torch.equal(weight, checkpoint.read(key)), key
    run_ranks(
        2, _run, {**recipe(2, folder="next", init=str(done.folder))}, tiny.tiny_json("zero1", **tensor), timeout=600
    )
    assert Checkpoint.open(tmp_path / "next").step == 2


def test_the_gate_leaves_out_nothing_of_a_derived_model(store):
    """Every parameter of plain transformers is in the derived table, once, with its shape."""
    for name in ("gemma2", "phi3", "mixtral"):
        plan = plan_in(recipe_for(name, store, FAMILIES[name]), tiny.tiny_json(), ONE, 2)
        from zeropipe.trainer.testing.curves import plain_model

        family = family_of(plan.model_config)
        assert isinstance(family, Derived)
        theirs = {key: tuple(p.shape) for key, p in plain_model(plan).named_parameters()}
        assert {spec.name: spec.shape for spec in family.rows} == theirs
        assert plan.parameters is not None and plan.parameters >= sum(int(np.prod(s)) for s in theirs.values())
