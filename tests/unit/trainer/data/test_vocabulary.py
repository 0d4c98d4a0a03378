"""A tokenizer given as vocab.json and merges.txt only, from the plan to the export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer

from tests.tiny import plan_of
from tests.unit.trainer.runs import CONFIGS, VOCAB, fresh_model, run_recipe, write_run
from zeropipe.launcher.cli import main
from zeropipe.trainer.evaluation.text_bytes import byte_lengths
from zeropipe.trainer.export.load import load_tokenizer

TEXT = "def main(argv=None):\n    return 'é'"


@pytest.fixture(scope="module")
def bare(text_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of the store, in GPT-2's two files."""
    folder = tmp_path_factory.mktemp("bare")
    model = json.loads((text_store / "tokenizer" / "tokenizer.json").read_text("utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    return folder


def test_it_is_planned_with_the_store_and_alone(text_store: Path, bare: Path, tmp_path: Path):
    recipe = {**run_recipe(text_store, tmp_path / "run", CONFIGS["gpt2"]), "tokenizer": str(bare)}
    assert plan_of(recipe, {}, 1).vocab_size == VOCAB
    prefix = next(text_store.glob("shard-*.idx")).with_suffix("")
    alone = {**run_recipe(prefix, tmp_path / "run", CONFIGS["gpt2"]), "tokenizer": str(bare)}
    end = Tokenizer.from_file(str(text_store / "tokenizer" / "tokenizer.json")).token_to_id("<|endoftext|>")
    made = plan_of(alone, {}, 1)
    assert (made.vocab_size, made.model_config["eos_token_id"]) == (VOCAB, end)


def test_it_is_loaded_measured_and_exported(text_store: Path, bare: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    ids = Tokenizer.from_file(str(text_store / "tokenizer" / "tokenizer.json")).encode(TEXT).ids
    assert load_tokenizer(bare)(TEXT)["input_ids"] == ids
    ours, stores = byte_lengths(bare, VOCAB), byte_lengths(text_store / "tokenizer", VOCAB)
    assert ours is not None and stores is not None and ours.tolist() == stores.tolist()
    config = {**CONFIGS["gpt2"], "vocab_size": VOCAB}
    run = write_run(tmp_path / "run", text_store, fresh_model(config), config)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "tokenizer": str(bare)}))
    assert main(["export", str(run)]) == 0
    exported = AutoTokenizer.from_pretrained(run / "export", local_files_only=True)
    assert exported(TEXT)["input_ids"] == ids and exported.eos_token == "<|endoftext|>"
