"""GGUF files, read by transformers and compared with the model that they were made from."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import LLAMA
from tests.unit.trainer.runs import CONFIGS, VOCAB, fresh_model, write_run
from zeropipe.data_prep.errors import UserError
from zeropipe.launcher.cli import main
from zeropipe.trainer.export.gguf import pre_tokenizer
from zeropipe.trainer.export.huggingface import export

OWN = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
QWEN: dict[str, Any] = {**LLAMA, "use_sliding_window": False, "tie_word_embeddings": True, **OWN}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**CONFIGS["llama"], **OWN},
    "llama_tied": {**CONFIGS["llama_tied"], **OWN},
    "qwen2": {**QWEN, "model_type": "qwen2"},
    "qwen3": {**QWEN, "model_type": "qwen3", "head_dim": 128},
}


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "f16"), ("llama_tied", "q8_0"), ("qwen2", "q8_0"), ("qwen3", "f16")]
)
def test_transformers_reads_the_same_model(family, kind, text_store, tmp_path):
    config = FAMILIES[family]
    model = fresh_model(config)
    done = export(write_run(tmp_path / "run", text_store, model, config), gguf=kind)
    read = AutoModelForCausalLM.from_pretrained(done.folder, gguf_file=f"model-{kind}.gguf", dtype=torch.float32)
    expected = dict(model.named_parameters())
    for name, parameter in read.named_parameters():
        wanted = expected.pop(name).detach()
        if parameter.ndim == 1:
            assert torch.equal(parameter, wanted), name
        elif kind == "f16":
            assert torch.equal(parameter, wanted.half().float()), name
        else:
            assert torch.equal(parameter, in_q8(wanted)), name
    assert not expected
    ids = (torch.arange(24)[None] * 31 + 1) % VOCAB
    with torch.no_grad():
        ours, theirs = model(ids).logits, read(ids).logits
    assert (ours - theirs).abs().max() <= (2e-3 if kind == "f16" else 3e-2) * ours.abs().max()
    if family.startswith("qwen"):
        return  # whose reader in transformers splits text as Qwen's own tokenizer does, whatever the file says
    text = "def f(x):\n    return x + 2026  # naïve"
    ids = AutoTokenizer.from_pretrained(done.folder)(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(done.folder, gguf_file=f"model-{kind}.gguf")(text)["input_ids"] == ids


def in_q8(weight: torch.Tensor) -> torch.Tensor:
    """What the format's description says: of 32 weights, whole numbers up to 127 and a scale in f16."""
    blocks = weight.numpy().reshape(-1, 32)
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    numbers = blocks * np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    whole = np.copysign(np.floor(np.abs(numbers) + np.float32(0.5)), numbers)  # halves go away from zero, as in C
    return torch.from_numpy(whole * scale.astype(np.float16).astype(np.float32)).reshape(weight.shape)


def test_what_gguf_has_no_words_for_is_refused_by_name(gpt2_run, text_store, tmp_path, capsys):
    assert main(["export", str(gpt2_run), "--output", str(tmp_path / "out"), "--gguf", "f16"]) == 2
    assert "cannot write gpt2; families that can be: llama, mistral, qwen2, qwen3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    config = {**FAMILIES["llama"], "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    with pytest.raises(UserError, match="a llama with rope type 'linear'"):
        export(write_run(tmp_path / "run", text_store, fresh_model(config), config), gguf="f16")


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        ([{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False}], "smollm"),
        ([{"type": "ByteLevel", "add_prefix_space": True}], None),
        ([{"type": "Whitespace"}], None),
    ],
)
def test_how_text_is_split_has_a_name_or_is_refused(parts, name):
    tokenizer = json.loads(json.dumps({"pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}}))
    if name is None:
        with pytest.raises(UserError, match="splits text before BPE"):
            pre_tokenizer(tokenizer)
    else:
        assert pre_tokenizer(tokenizer) == name
