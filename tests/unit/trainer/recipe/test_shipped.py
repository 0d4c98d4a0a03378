"""Shipped recipes: they load, plan with every shipped JSON, match their schema, and can be copied out."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.tiny import LLAMA, folder_of_zeros, tiny_records, tiny_store
from zeropipe.data_prep.errors import UserError
from zeropipe.launcher.cli import main
from zeropipe.trainer.plan.deepspeed_json import load_ds_config
from zeropipe.trainer.plan.plan import make_plan
from zeropipe.trainer.recipe.recipe import dump_recipe, load_recipe
from zeropipe.trainer.recipe.schema import recipe_schema
from zeropipe.trainer.recipe.text_files import parse_yaml, read_named, shipped_names

NAMES = shipped_names("recipes", ".yaml")
JSONS = shipped_names("ds_configs", ".json")
SCHEMA = json.loads(read_named("recipe.schema", "recipes", ".json")[0])


def test_the_shipped_schema_is_current():
    assert recipe_schema() == SCHEMA, "python -m zeropipe.trainer.recipe.schema > recipes/recipe.schema.json"
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipes_fit_the_schema(name: str):
    text, source = read_named(name, "recipes", ".yaml")
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    jsonschema.validate(parse_yaml(text, source), SCHEMA)
    jsonschema.validate(yaml.safe_load(dump_recipe(load_recipe(name))), SCHEMA)


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("optimiser", {}),
        ("optimizer", {"lrr": 1}),
        ("duration", {"steps": 0}),
        ("batch", {"global": "8"}),
        ("seed", -1),
    ],
)
def test_the_schema_finds_what_the_loader_refuses(section: str, value: object):
    text, source = read_named("demo", "recipes", ".yaml")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**parse_yaml(text, source), section: value}, SCHEMA)


def test_gpt2_345m_is_the_one_that_people_know():
    recipe = load_recipe("gpt2_345m")
    assert recipe.model.config == {
        "model_type": "gpt2",
        "n_layer": 24,
        "n_embd": 1024,
        "n_head": 16,
        "n_positions": 1024,
    }
    assert (recipe.name, str(recipe.output)) == ("gpt2-345m", "runs/gpt2-345m")
    assert (recipe.data.seq_len, recipe.data.split, recipe.batch.global_batch) == (1024, "949,50,1", 8)
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay) == (1.5e-4, 0.01)
    assert (recipe.schedule.type, recipe.schedule.min_lr, recipe.schedule.warmup) == ("cosine", 1e-5, 0.01)
    assert (recipe.duration.steps, recipe.save.every) == (5000, 500)
    assert (recipe.eval.every, recipe.eval.batches) == (100, 10)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shipped")
    tiny_store(folder / "data" / "corpus", documents=1_500, vocab=50257)
    tiny_store(folder / "data" / "demo", documents=200)
    tiny_store(folder / "data" / "cpt", documents=400, vocab=49_152)
    for kind in ("sft", "dpo"):
        for split in ("train", "valid"):
            tiny_records(folder / "data" / f"{kind}-{split}", kind, records=400, vocab=49_152)
    folder_of_zeros(folder / "material/smollm2", {**LLAMA, "vocab_size": 49_152, "max_position_embeddings": 2048})
    return folder


@pytest.mark.parametrize("config", JSONS)
@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_pair_plans_on_two_devices(data: Path, monkeypatch: pytest.MonkeyPatch, name: str, config: str):
    monkeypatch.chdir(data)
    recipe, ds = load_recipe(name, ["data.seq_len=64"]), load_ds_config(config)
    if name == "qlora" and "bf16" in ds:
        with pytest.raises(UserError, match="use torch_autocast"):
            make_plan(recipe, ds, 2)
        return
    plan = make_plan(recipe, ds, 2)
    assert plan.micro_batch * plan.accumulation * 2 == plan.global_batch
    if name == "gpt2_345m":
        assert (plan.micro_batch, plan.accumulation, plan.total_steps, plan.warmup_steps) == (4, 1, 5000, 50)
        assert plan.deepspeed["gradient_clipping"] == 1.0
        assert plan.padded_vocab_size == 50304
        assert plan.parameters == 354_871_296  # 354,823,168 of the released GPT-2 medium, and 47 rows of padding


def test_a_first_small_run_is_not_refused(data: Path, monkeypatch: pytest.MonkeyPatch):
    """The micro batch is the largest up to 4 that divides a rank's share."""
    monkeypatch.chdir(data)
    for sequences, micro in ((1, 1), (2, 2), (3, 3), (6, 3), (7, 1), (8, 4), (12, 4)):
        recipe = load_recipe("gpt2_345m", ["data.seq_len=64", f"batch.global={sequences}"])
        plan = make_plan(recipe, load_ds_config("zero2"), 1)
        assert (plan.micro_batch, plan.accumulation) == (micro, sequences // micro)


def test_init_copies_everything_out(tmp_path: Path, capsys: pytest.CaptureFixture):
    target = tmp_path / "mine"
    assert main(["init", str(target)]) == 0
    assert {path.name for path in (target / "recipes").iterdir()} == {f"{n}.yaml" for n in NAMES} | {
        "recipe.schema.json"
    }
    assert {path.name for path in (target / "ds_configs").iterdir()} == {f"{name}.json" for name in JSONS}
    copied = load_recipe(str(target / "recipes" / "demo.yaml"))
    assert copied == load_recipe("demo")
    assert load_ds_config(str(target / "ds_configs" / "zero3.json")) == load_ds_config("zero3")
    assert main(["init", str(target)]) == 0  # again: nothing has changed
    (target / "recipes" / "demo.yaml").write_text("name: mine\n")
    capsys.readouterr()
    assert main(["init", str(target)]) == 2
    assert "recipes/demo.yaml exist and differ; use another folder, or --force" in capsys.readouterr().err
    assert (target / "recipes" / "demo.yaml").read_text() == "name: mine\n"
    assert main(["init", str(target), "--force"]) == 0
    assert load_recipe(str(target / "recipes" / "demo.yaml")) == copied
