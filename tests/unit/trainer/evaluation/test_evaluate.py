"""Loss, perplexity and bits per byte against plain transformers on the raw token file, and what eval refuses."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import tiny_store
from tests.unit.trainer.runs import (
    CONFIGS,
    VOCAB,
    document_ends,
    fresh_model,
    raw_tokens,
    run_recipe,
    write_run,
)
from zeropipe.launcher.cli import main
from zeropipe.trainer.evaluation.evaluate import EvalResult
from zeropipe.trainer.export.huggingface import export
from zeropipe.trainer.metrics.reading import read_metrics

SMALL = {**CONFIGS["gpt2"], "vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}


def evaluate(capsys: pytest.CaptureFixture, *words: str) -> dict:
    capsys.readouterr()
    assert main(["eval", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def valid_tokens(store) -> np.ndarray:
    """Documents from 80 % to 90 % of the store, which is what split 8,1,1 gives to valid."""
    ends = [0, *document_ends(store)]
    first, last = round(0.8 * (len(ends) - 1)), round(0.9 * (len(ends) - 1))
    return raw_tokens(store)[ends[first] : ends[last]]


def plain_loss(model, tokens: np.ndarray, length: int, windows: int | None = None) -> tuple[float, np.ndarray]:
    """Mean loss over consecutive windows with transformers' own loss, and the predicted tokens."""
    count = (len(tokens) - 1) // length if windows is None else windows
    losses, predicted = [], []
    for window in range(count):
        ids = torch.from_numpy(tokens[window * length : (window + 1) * length + 1])[None]
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
        predicted.append(tokens[window * length + 1 : (window + 1) * length + 1])
    return sum(losses) / len(losses), np.concatenate(predicted)


@pytest.mark.distributed
def test_perplexity_equals_plain_transformers(gpt2_run, text_store, tmp_path, capsys):
    found = evaluate(capsys, str(gpt2_run))
    folder = export(gpt2_run, tmp_path / "export").folder
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    loss, predicted = plain_loss(model, valid_tokens(text_store), 32)
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["eval_tokens"] == len(predicted)
    # the windows cut characters in two, so bytes are counted on the text between them
    text = tokenizer.decode(predicted.tolist(), skip_special_tokens=True)
    assert found["bytes_are_exact"]
    text_bytes = len(predicted) * loss / math.log(2) / found["bits_per_byte"]
    assert text_bytes == pytest.approx(len(text.encode()), rel=1e-5)
    assert found["bigram_entropy"] < found["unigram_entropy"] < math.log(VOCAB)


@pytest.mark.distributed
def test_the_run_itself_evaluated_the_same(gpt2_run, capsys):
    during = {r["step"]: r for r in read_metrics(gpt2_run) if r["kind"] == "eval"}
    for step in (3, 6):
        after = evaluate(capsys, str(gpt2_run), "--batches", "2", "--checkpoint", str(step))
        for figure in ("loss", "perplexity", "bits_per_byte"):
            assert after[figure] == pytest.approx(during[step][figure], rel=1e-5)
        assert after["eval_tokens"] == 2 * 8 * 32


@pytest.mark.distributed
def test_a_hugging_face_folder_on_a_store(gpt2_run, text_store, tmp_path, capsys):
    folder = export(gpt2_run, tmp_path / "export").folder
    found = evaluate(capsys, str(folder), "--store", str(text_store), "--seq-len", "48", "--batches", "3")
    model = AutoModelForCausalLM.from_pretrained(folder)
    loss, predicted = plain_loss(model, raw_tokens(text_store), 48, windows=3 * 8)
    assert found["loss"] == pytest.approx(loss, rel=1e-6) and found["eval_tokens"] == len(predicted)
    with pytest.raises(AssertionError):
        evaluate(capsys, str(folder))  # it knows of no data
    inside = export(gpt2_run, gpt2_run / "inside").folder
    assert evaluate(capsys, str(inside)) == evaluate(capsys, str(gpt2_run))


def test_masked_documents_are_evaluated_apart(text_store, tmp_path, capsys):
    """Each document's part of a window alone, with positions from zero, and no loss from one document to the next."""
    model = fresh_model(SMALL)
    run = write_run(tmp_path / "run", text_store, model, SMALL)
    masked = run_recipe(text_store, run, CONFIGS["gpt2"], data={"split": "8,1,1", "document_mask": True})
    (run / "recipe.yaml").write_text(json.dumps(masked))
    found = evaluate(capsys, str(run), "--store", str(text_store), "--batches", "2", "--by", "position", "source")
    tokens, ends = raw_tokens(text_store), set(document_ends(text_store).tolist())
    loss_sum, count, by_place = 0.0, 0, {}
    for window in range(16):
        first, stop = window * 32, (window + 1) * 32 + 1
        cuts = [first, *sorted(cut for cut in ends if first < cut < stop), stop]
        for begin, end in pairwise(cuts):
            if end - begin > 1:
                ids = torch.from_numpy(tokens[begin:end])[None]
                with torch.no_grad():
                    answer = model(input_ids=ids, labels=ids)
                loss_sum += answer.loss.item() * (end - begin - 1)
                count += end - begin - 1
                nats = -answer.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                for place, value in enumerate(nats.tolist()):
                    by_place.setdefault(place.bit_length(), []).append(value)
    assert found["eval_tokens"] == count
    assert found["loss"] == pytest.approx(loss_sum / count, rel=1e-6)
    names = ["0", "1", "2-3", "4-7", "8-15", "16-31"]
    assert [share["name"] for share in found["by_position"]] == names
    for number, share in enumerate(found["by_position"]):
        assert share["tokens"] == len(by_place[number])
        assert share["loss"] == pytest.approx(sum(by_place[number]) / len(by_place[number]), rel=1e-5)
    (whole,) = found["by_source"]
    assert (whole["name"], whole["tokens"]) == (text_store.name, count)
    assert whole["loss"] == pytest.approx(found["loss"], rel=1e-9)


def test_each_store_has_its_own_loss(text_store, tmp_path, capsys):
    """Two stores one after the other, cut into global batches that hold samples of both."""
    run = write_run(tmp_path / "run", text_store, fresh_model(SMALL), SMALL)
    stores = [tiny_store(tmp_path / name, documents=20, seed=seed) for seed, name in enumerate(("web", "code"))]
    valid = {"train": [{"store": str(stores[0])}], "valid": [{"store": str(store)} for store in stores]}
    recipe = run_recipe(text_store, run, CONFIGS["gpt2"])
    (run / "recipe.yaml").write_text(json.dumps({**recipe, "data": {**valid, "seq_len": 32}}))
    shares = evaluate(capsys, str(run), "--by", "source")["by_source"]
    assert [share["name"] for share in shares] == ["web", "code"]
    for share, store in zip(shares, stores, strict=True):
        alone = evaluate(capsys, str(run), "--store", str(store))
        assert share["tokens"] == alone["eval_tokens"]
        assert share["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert main(["eval", str(run), "--by", "position", "--batches", "1"]) == 0
    assert "by tokens of the text before:" in capsys.readouterr().out


def test_a_report_for_people(text_store, tmp_path, capsys):
    run = write_run(tmp_path / "run", text_store, fresh_model(SMALL), SMALL)
    assert main(["eval", str(run), "--batches", "1"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("perplexity", "bits per byte", "unigram", "bigram", "valid split"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--batches", "none"], "--batches none"),
        (["--batches", "0"], "--batches 0"),
        (["--store", "nowhere"], "nowhere"),
        (["--split", "test", "--checkpoint", "9"], "no checkpoint at step 9; there are 1"),
        (["--device", "cuda:77"], "--device cuda:77"),
        (["--store", "STORE", "--seq-len", "65"], "65 tokens are longer than the model's context of 64"),
    ],
)
def test_what_cannot_be_evaluated(words, expected, text_store, tmp_path, capsys):
    run = write_run(tmp_path / "run", text_store, fresh_model(SMALL), SMALL)
    words = [str(text_store) if word == "STORE" else word for word in words]
    assert main(["eval", str(run), *words]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_a_store_of_another_tokenizer_is_refused(text_store, tmp_path, capsys):
    config = {**SMALL, "vocab_size": 100}
    run = write_run(tmp_path / "run", text_store, fresh_model(config), config)
    assert main(["eval", str(run)]) == 2
    assert "the model's tokenizer" in capsys.readouterr().err


def test_pickled_weights_are_refused_by_name(text_store, tmp_path, capsys):
    folder = tmp_path / "old"
    fresh_model(SMALL).config.save_pretrained(folder)
    torch.save({}, folder / "pytorch_model.bin")
    assert main(["eval", str(folder), "--store", str(text_store)]) == 2
    error = capsys.readouterr().err
    assert "pytorch_model.bin" in error and "safetensors" in error


def test_missing_weights_are_refused_by_name(text_store, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "holes"
    fresh_model(SMALL).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert main(["eval", str(folder), "--store", str(text_store)]) == 2
    assert "transformer.h.1.mlp.c_fc.weight" in capsys.readouterr().err


def test_bits_per_byte():
    assert EvalResult(2 * math.log(2), 10, 4.0).bits_per_byte == pytest.approx(0.5)
    assert EvalResult(1.0, 10).bits_per_byte is None
    assert EvalResult(1000.0, 10).perplexity == math.inf
