"""Finding what belongs to a run, from anywhere and from any of its parts."""

import json

import pytest
import yaml

from tests.tiny import tiny_recipe
from zeropipe.trainer.run.directory import load_run_recipe, run_directory, run_precision, tokenizer_folder


@pytest.fixture
def run(tmp_path, text_store, monkeypatch):
    """A run that was started in `project`, by a relative path to its store; now someone stands elsewhere."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (project / "data").mkdir(parents=True)
    elsewhere.mkdir()
    (project / "data" / "corpus").symlink_to(text_store)
    run = project / "runs" / "one"
    (run / "checkpoints" / "step-00000003").mkdir(parents=True)
    recipe = tiny_recipe("data/corpus", "runs/one")  # type: ignore[arg-type]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run / "environment.json").write_text(json.dumps({"directory": str(project)}))
    (run / "deepspeed.json").write_text(json.dumps({"bf16": {"enabled": True}}))
    monkeypatch.chdir(elsewhere)
    return run


def test_every_part_knows_its_run(run, tmp_path):
    for part in (run, run / "checkpoints", run / "checkpoints" / "step-00000003"):
        assert run_directory(part) == run
    assert run_directory(tmp_path) is None


def test_relative_stores_are_found_from_elsewhere(run):
    recipe = load_run_recipe(run)
    assert recipe.data.train[0].store == str(run.parent.parent / "data" / "corpus")
    assert (
        tokenizer_folder(run / "checkpoints" / "step-00000003") == run.parent.parent / "data" / "corpus" / "tokenizer"
    )


def test_a_run_whose_store_has_gone_has_no_tokenizer(run):
    (run.parent.parent / "data" / "corpus").unlink()
    assert tokenizer_folder(run) is None


@pytest.mark.parametrize(
    ("state", "config", "expected"),
    [
        ({"precision": "fp32"}, {"bf16": {"enabled": True}}, ("float32", "float32")),
        ({"precision": "bf16_autocast"}, {}, ("float32", "bfloat16")),
        ({}, {"bf16": {"enabled": True}}, ("bfloat16", "bfloat16")),
        ({}, {"fp16": {"enabled": True}, "bf16": {"enabled": False}}, ("float16", "float16")),
        ({}, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, ("float32", "bfloat16")),
        ({}, {}, ("float32", "float32")),
    ],
)
def test_precision_of_a_run(run, state, config, expected):
    (run / "deepspeed.json").write_text(json.dumps(config))
    found = run_precision(run / "checkpoints" / "step-00000003", state)
    assert (found.weights, found.products) == expected
