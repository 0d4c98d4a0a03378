"""Model cards, provenance, and `zeropipe verify`: an honest run passes, and every byte that changes is found."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.tiny import tiny_json, train_on_ranks
from tests.unit.trainer.runs import CONFIGS, run_recipe
from zeropipe.data_prep import durable
from zeropipe.launcher.cli import main
from zeropipe.trainer.export.huggingface import export
from zeropipe.trainer.export.provenance import read_provenance
from zeropipe.trainer.testing.retrace import retrace, stretches_of


@pytest.fixture(scope="module")
def handed(text_store, tmp_path_factory) -> tuple[Path, Path, Path]:
    """Copies that a test may damage: a store, a run on two ranks that read it, and its export."""
    folder = tmp_path_factory.mktemp("handed")
    store = shutil.copytree(text_store, folder / "store")
    recipe = run_recipe(store, folder / "run", {**CONFIGS["gpt2"], "resid_pdrop": 0.1})
    recipe["data"]["train"][0]["license"] = "PSF-2.0"
    train_on_ranks(2, recipe, tiny_json("zero1"))
    return store, folder / "run", export(folder / "run", folder / "model").folder


def test_an_honest_run_passes(handed, capsys):
    _, run, model = handed
    assert main(["verify", str(model)]) == 0
    assert main(["verify", str(model), "--against", str(run), "--replay", "3"]) == 0
    out, err = capsys.readouterr()
    assert "whole" in out and "taking steps 4 to 6 again" in err


def test_the_manifest_holds_plain_sha256_digests(handed):
    store, run, model = handed
    facts = read_provenance(model)
    assert {path.name for path in model.iterdir()} == {*facts["files"], "provenance.json"}
    for name, digest in facts["files"].items():
        assert digest == hashlib.sha256((model / name).read_bytes()).hexdigest()
    (source,) = facts["data"]
    assert {"shard-00000.bin", "shard-00000.idx", "manifest.json", "tokenizer/tokenizer.json"} <= source["files"].keys()
    for name, digest in source["files"].items():
        assert digest == hashlib.sha256((store / name).read_bytes()).hexdigest()
    assert facts["checkpoints"].keys() == {"step-00000003", "step-00000006"}
    assert str(run.parent) not in json.dumps({k: v for k, v in facts.items() if k != "data"})


def test_the_card_is_one_that_hugging_face_reads(handed):
    store, run, model = handed
    card = ModelCard.load(model / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag, card.data.model_name) == (
        "transformers",
        "text-generation",
        "tiny",
    )
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(r for r in reversed(records) if r["kind"] == "eval")
    measured = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert measured["perplexity"] == last["perplexity"]
    manifest = json.loads((store / "manifest.json").read_text())
    assert manifest["fingerprint"][:16] in card.text and "PSF-2.0" in card.text
    assert f"{manifest['num_tokens']:,}" in card.text
    embedded = card.text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(embedded) == yaml.safe_load((run / "recipe.yaml").read_text())


@pytest.mark.parametrize(
    "what",
    ["store/shard-00000.bin", "store/shard-00000.idx", "store/manifest.json", "store/tokenizer/tokenizer.json",
     "model/model.safetensors", "model/README.md", "model/config.json", "model/tokenizer.json", "model/provenance.json",
     "run/recipe.yaml", "run/deepspeed.json", "run/checkpoints/step-00000003/rank-00001.safetensors",
     "run/checkpoints/step-00000006/state.json", "run/checkpoints/step-00000006/manifest.json"],
)  # fmt: skip
def test_a_changed_byte_is_found(what, handed, capsys, monkeypatch):
    monkeypatch.setattr(durable, "PAUSES", ())  # what cannot be read is not read again
    _, run, model = handed
    path = run.parent / what
    before = path.read_bytes()
    for place in (0, random.Random(what).randrange(len(before)), len(before) - 1):
        path.write_bytes(before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :])
        try:
            assert main(["verify", str(model), "--against", str(run)]) == 2, f"byte {place}"
            assert path.name in capsys.readouterr().err
        finally:
            path.write_bytes(before)


def test_other_files_and_other_steps_are_found(handed, tmp_path, capsys):
    _, run, model = handed
    (model / "tokenizer.model").write_text("")
    assert main(["verify", str(model)]) == 2
    (model / "tokenizer.model").unlink()
    assert "tokenizer.model: was not there" in capsys.readouterr().err
    metrics = run / "metrics.jsonl"
    before = metrics.read_text()
    lines = [json.loads(line) for line in before.splitlines()]
    next(line for line in lines if line["kind"] == "train" and line["step"] == 2)["loss"] += 1e-9
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        assert main(["verify", str(model), "--against", str(run)]) == 2
        assert "its steps until 6" in capsys.readouterr().err
    finally:
        metrics.write_text(before)


def test_a_replay_of_another_seed_differs(handed, tmp_path):
    _, run, _ = handed
    other = shutil.copytree(run, tmp_path / "run")
    text = (other / "recipe.yaml").read_text()
    seed = yaml.safe_load(text)["seed"]
    (other / "recipe.yaml").write_text(text.replace(f"seed: {seed}\n", f"seed: {seed + 1}\n"))
    (stretch,) = stretches_of(other)
    loss, tensors = retrace(other, stretch)
    assert loss.startswith("step 4: its loss is ") and tensors.startswith("steps 4 to 6: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--replay", "1"], "--against"),
        (["--seed", "1"], "--replay"),
        (["--against", "MODEL"], "no run directory"),
        (["--against", "RUN", "--replay", "0"], "more than 0"),
    ],
)
def test_what_cannot_be_asked_is_said(words, said, handed, capsys):
    _, run, model = handed
    words = [{"MODEL": str(model), "RUN": str(run)}.get(word, word) for word in words]
    assert main(["verify", str(model), *words]) == 2
    assert said in capsys.readouterr().err
