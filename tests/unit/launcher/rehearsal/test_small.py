"""The small version of a recipe that is rehearsed with: what stays, and what is refused."""

import json

import pytest

from tests.tiny import GPT2, LLAMA, tiny_store
from zeropipe.data_prep.errors import UserError
from zeropipe.launcher.rehearsal.small import write_small
from zeropipe.trainer.plan.deepspeed_json import load_pair
from zeropipe.trainer.plan.plan import make_plan
from zeropipe.trainer.recipe.recipe import Recipe


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("small") / "store")


def recipe_on(store, model: dict, **sections) -> Recipe:
    values = {
        "model": {"config": model},
        "data": {"train": [{"store": str(store)}], "split": "90,10,0", "seq_len": 1024},
        "batch": {"global": 512},
        "duration": {"tokens": 10**9},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.2},
    }
    return Recipe.model_validate({**values, **sections})


@pytest.mark.parametrize(
    ("model", "big", "ds", "pipeline", "slots"),
    [
        ({**GPT2, "n_layer": 48, "n_embd": 1600, "n_head": 25, "n_positions": 1024}, "n_embd", {}, 1, 1),
        (
            {**LLAMA, "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "rope_theta": 5e5},
            "hidden_size",
            {"tensor_parallel": {"autotp_size": 2}},
            2,
            2,
        ),
    ],
)
def test_family_layout_and_settings_stay(store, tmp_path, model, big, ds, pipeline, slots):
    ds |= {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 16}
    recipe = recipe_on(store, model, parallel={"pipeline": pipeline})
    assert write_small(recipe, ds, 2, tmp_path) == slots
    small, written = load_pair(str(tmp_path / "recipe.yaml"), str(tmp_path / "deepspeed.json"))
    assert {**written, "train_micro_batch_size_per_gpu": 16} == ds == {**ds, **json.loads(json.dumps(written))}
    plan = make_plan(small, written, 2 * slots)
    assert (plan.layout.pipeline, plan.layout.tensor) == (pipeline, 2 if "tensor_parallel" in ds else 1)
    assert plan.model_config["model_type"] == model["model_type"]
    assert plan.model_config[big] == 64
    assert plan.model_config.get("rope_theta") == model.get("rope_theta")
    assert small.optimizer == recipe.optimizer
    assert small.output == tmp_path / "run"


def test_what_cannot_be_planned_small_is_refused(store, tmp_path):
    with pytest.raises(UserError, match="its small version cannot be run on 2 hosts"):
        write_small(recipe_on(store, GPT2, parallel={"pipeline": 2}), {"zero_optimization": {"stage": 3}}, 2, tmp_path)
