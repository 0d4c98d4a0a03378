"""A bad step of two ranks, taken again in one process from its capsule: the module at fault is named."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.harness import run_ranks
from tests.tiny import LLAMA, VOCAB, _train, tiny_json, tiny_recipe, tiny_store
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.data.samples import open_samples, sample_order
from zeropipe.trainer.metrics.reading import read_metrics
from zeropipe.trainer.recipe.recipe import Recipe

pytestmark = pytest.mark.distributed

CONFIG = {**LLAMA, "tie_word_embeddings": False, "attention_dropout": 0.1}
SLOW = pytest.mark.slow
EMBEDDING = "model.embed_tokens"


def model_folder(path: Path, name: str, change) -> Path:
    """A Hugging Face model with one tensor of it changed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG, vocab_size=VOCAB))
    with torch.no_grad():
        change(model.get_parameter(name))
    model.save_pretrained(path)
    return path


def train(recipe: dict, ds: dict) -> str:
    try:
        return str(_train(recipe, ds))
    except UserError as error:
        return str(error)


def replayed(capsule: str) -> tuple[int, str]:
    from zeropipe.launcher.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(["replay", capsule])
    return code, out.getvalue()


def bad_run(tmp_path: Path, folder: Path, store: Path, ds: dict, **sections) -> tuple[str, Path]:
    """What ranks said of a run that begins with this model, and its capsule."""
    recipe = tiny_recipe(store, tmp_path / "run", model={"init": str(folder), "config": {}}, **sections)
    [said] = set(run_ranks(2, train, recipe, ds))
    [found] = re.findall(r"zeropipe replay (\S+) looks", said)
    return said, Path(found)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tiny_store(tmp_path_factory.mktemp("data") / "store")


def first_steps(recipe: dict, steps: int, size: int = 8) -> list[list[set[int]]]:
    """The tokens of each sample of the run's first steps."""
    parsed = Recipe.model_validate(recipe)
    samples = open_samples(parsed, "train")
    _, numbers = sample_order(parsed, samples).sample(np.arange(steps * size))
    tokens = [set(samples[0].record(int(number)).inputs.tolist()) for number in numbers]
    return [tokens[at : at + size] for at in range(0, len(tokens), size)]


def test_a_sample_that_brings_a_number_down(store, tmp_path):
    """A token that first comes in step 4 has an infinite embedding; the newest checkpoint is of step 2."""
    recipe = tiny_recipe(store, tmp_path / "run", model={"config": CONFIG})
    *before, fourth = first_steps(recipe, 4)
    token = min(set().union(*fourth) - {token for step in before for sample in step for token in sample})
    folder = model_folder(tmp_path / "model", EMBEDDING + ".weight", lambda p: p[token].fill_(float("inf")))
    said, capsule = bad_run(tmp_path, folder, store, tiny_json("zero2"), save={"every": 2})
    assert said.startswith("step 4: the loss is nan (samples 24 to 31")
    facts = json.loads((capsule / "capsule.json").read_text())
    assert facts["step"] == 4 and facts["checkpoint"].endswith("checkpoints/step-00000002")
    [(code, text)] = run_ranks(1, replayed, str(capsule))
    assert code == 0, text
    losses = {r["step"]: r["loss"] for r in read_metrics(tmp_path / "run") if r["kind"] == "train"}
    again = float(re.findall(r"^step 3: loss (\S+)$", text, re.MULTILINE)[0])
    assert again == pytest.approx(losses[3], abs=2e-4)  # four digits are told; another dropout would be far off
    assert f"first: {EMBEDDING}: its output is infinite" in text and "its own weight is no number" in text
    rows = [row for row, sample in enumerate(fourth) if token in sample]
    micro, first = divmod(rows[0], 2)
    assert f"micro batch {micro // 2} of data-parallel rank {micro % 2}" in text
    named = re.findall(r"row (\d+): sample (\d+) of (\S+)", text)
    assert int(named[0][0]) == first and facts["sample_ids"][rows[0]] == [named[0][2], int(named[0][1])]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("model.layers.1.mlp.up_proj.weight", lambda p: p[3, 5].fill_(float("nan")), "its own weight is no number"),
        pytest.param("model.layers.0.self_attn.v_proj.weight", lambda p: p.fill_(3e38), "is finite", marks=SLOW),
    ],
)
@pytest.mark.parametrize("layout", ["zero3", pytest.param("pipeline", marks=SLOW)])
def test_a_module_with_wrong_weights(name, change, words, layout, store, tmp_path):
    folder = model_folder(tmp_path / "model", name, change)
    sections = {"parallel": {"pipeline": 2}} if layout == "pipeline" else {}
    ds = tiny_json("zero1" if layout == "pipeline" else layout)
    said, capsule = bad_run(tmp_path, folder, store, ds, **sections)
    assert said.startswith("step 1: the loss is nan")
    [(code, text)] = run_ranks(1, replayed, str(capsule))
    assert code == 0 and f"first: {name.removesuffix('.weight')}: its output is " in text and words in text, text


def test_what_is_no_capsule(tmp_path, capsys):
    from zeropipe.launcher.cli import main

    assert main(["replay", str(tmp_path)]) == 2
    assert "no replay capsule (capsule.json is missing)" in capsys.readouterr().err
