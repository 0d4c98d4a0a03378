"""Sample answers of a run, on several layouts, against `generate` on what the run saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness import RankFailed
from tests.tiny import LLAMA, tiny_json, tiny_recipe, train_on_ranks
from zeropipe.data_prep.making.options import Options
from zeropipe.data_prep.making.prepare import prepare
from zeropipe.trainer.evaluation.generation import Sampling, generate
from zeropipe.trainer.export.load import load_model
from zeropipe.trainer.metrics.reading import read_metrics

pytestmark = pytest.mark.distributed
PROMPTS = ["The cat sat", "A rain fell on the"]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    text = "The cat sat on the mat. A rain fell on the cat. The mat was wet, and the cat was wet.\n"
    (folder / "text.txt").write_text(text * 200)
    inputs = (str(folder / "text.txt"),)
    return prepare(Options(folder / "store", inputs, train_tokenizer=300, workers=0, quiet=True)).path


def recipe_of(store: Path, output: Path, **sections: Any) -> dict[str, Any]:
    held_out = {"every": 30, "batches": 1, "prompts": PROMPTS, "answer_tokens": 12}
    sections = {"duration": {"steps": 30}, "eval": held_out, "optimizer": {"lr": 1e-2}, **sections}
    data = {"split": "1", "valid": [{"store": str(store)}]}
    return tiny_recipe(store, output, model={"config": LLAMA}, data=data, **sections)


LAYOUTS: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
    ("zero3", 2, {}, {}),
    ("zero1", 2, {"parallel": {"pipeline": 2}}, {}),
    ("zero1", 2, {}, {"sequence_parallel_size": 2}),
]


@pytest.mark.parametrize(("stage", "world", "sections", "extra"), LAYOUTS)
def test_they_are_what_the_saved_model_generates(stage, world, sections, extra, store, tmp_path):
    recipe = recipe_of(store, tmp_path / "run", **sections)
    recipe["data"].pop("split")
    train_on_ranks(world, recipe, tiny_json(stage, 2, **extra))
    answers = [record for record in read_metrics(tmp_path / "run") if record.get("event") == "answer"]
    assert [(record["step"], record["prompt"]) for record in answers] == [(30, prompt) for prompt in PROMPTS]
    expected = generate(*load_model(tmp_path / "run", "float32"), PROMPTS, Sampling(max_new_tokens=12))
    assert [record["answer"] for record in answers] == [found.text.strip() for found in expected]
    assert all(record["answer"] for record in answers)


def test_a_prompt_without_room_is_refused(store, tmp_path):
    recipe = recipe_of(store, tmp_path / "run")
    recipe["data"].pop("split")
    recipe["eval"] = {**recipe["eval"], "prompts": ["The cat " * 40]}
    with pytest.raises(
        RankFailed, match=r"eval.prompts: 'The cat .* tokens; 1 to 20 leave room for eval.answer_tokens"
    ):
        train_on_ranks(1, recipe, tiny_json("zero0", 2))
