"""Models built by name against Hugging Face's own, and what must hold of any causal LM."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import GPT2, LLAMA
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.families.specs import parameter_table
from zeropipe.trainer.modeling.build import build_model
from zeropipe.trainer.modeling.causal import CausalLM
from zeropipe.trainer.modeling.values import FolderValues, RandomValues
from zeropipe.trainer.ranks.ranks import Ranks

VOCAB = 300
IDS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
MISTRAL = {**LLAMA, "model_type": "mistral"}  # a family without a table
CONFIGS = {
    "gpt2": {**GPT2, **IDS},
    "gpt2 untied": {**GPT2, **IDS, "tie_word_embeddings": False},
    "llama": {**LLAMA, **IDS},
    "llama tied, biased": {**LLAMA, **IDS, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "mistral": {**MISTRAL, **IDS},
}


def hugging_face(config: dict) -> torch.nn.Module:
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="sdpa").eval()


def build(config: dict, values=None, dtype=torch.float32):
    return CausalLM(build_model(config, values, 1234, dtype, Ranks()), VOCAB, Ranks()).eval()


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "mistral"])
def test_the_table_is_hugging_faces_own_list(name):
    with torch.device("meta"):
        model = hugging_face(CONFIGS[name])
    expected = [(parameter, tuple(p.shape)) for parameter, p in model.named_parameters()]
    assert [(spec.name, spec.shape) for spec in parameter_table(CONFIGS[name])] == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_hugging_faces(name):
    """With the same weights, the padded model computes the same logits, to the last bit or the one before it."""
    reference = hugging_face(CONFIGS[name])
    weights = dict(reference.named_parameters())
    model = build(CONFIGS[name], lambda spec: weights[spec.name].detach())
    ids = torch.randint(0, VOCAB, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), reference(ids).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_last_token_changes_no_earlier_logit(name):
    model = build(CONFIGS[name])
    ids = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % VOCAB
    with torch.no_grad():
        one, two = model(ids), model(other)
    assert torch.equal(one[:, :-1], two[:, :-1])
    assert not torch.equal(one[:, -1], two[:, -1])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_is_never_predicted_nor_trained(name):
    model = build(CONFIGS[name]).train()
    ids = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(2))
    model(ids[:, :-1], ids[:, 1:]).sum().backward()
    padded = [p for p in model.parameters() if p.spec.padded_rows]  # type: ignore[attr-defined]
    assert padded and all(len(p) == 384 for p in padded)
    for parameter in padded:
        assert parameter[VOCAB:].abs().max() == 0 and parameter.grad[VOCAB:].abs().max() == 0
        assert parameter.grad[:VOCAB].abs().max() > 0
    assert model(ids).shape == (2, 24, VOCAB)


def test_initial_values_have_the_spread_that_gpt2_asks_for():
    config = {**CONFIGS["gpt2"], "n_layer": 8}
    for spec in parameter_table(config):
        value = RandomValues(1)(spec)
        if spec.name.endswith("c_proj.weight"):
            assert value.std().item() == pytest.approx(0.02 / 4, rel=0.05)  # 0.02 / sqrt(2 * 8 layers)
        elif value.dim() > 1:
            assert value.std().item() == pytest.approx(0.02, rel=0.05)
        else:
            assert set(value.tolist()) == {1.0 if spec.name.endswith("weight") else 0.0}


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_initial_values_follow_from_seed_and_name(name):
    def values(seed: int):
        return dict(build_model(CONFIGS[name], None, seed, torch.float32, Ranks()).named_parameters())

    torch.manual_seed(0)
    one = values(1)
    torch.manual_seed(99)
    same, other = values(1), values(2)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)
    norms = [value for key, value in one.items() if "norm" in key or (".ln_" in key and key.endswith("weight"))]
    assert norms and all(torch.equal(norm, torch.ones_like(norm)) for norm in norms)


def test_chunked_head_gives_the_same_loss_and_gradients(monkeypatch):
    model = build(CONFIGS["gpt2"])
    ids = torch.randint(0, VOCAB, (4, 33), generator=torch.Generator().manual_seed(3))
    labels = ids[:, 1:].clone()
    labels[0, :9] = -100
    results = []
    for chunk_bytes in (1 << 30, 4 * 384 * 10):  # whole; ten positions at a time
        monkeypatch.setattr("zeropipe.trainer.modeling.chunks.CHUNK_BYTES", chunk_bytes)
        model.zero_grad()
        loss = model(ids[:, :-1], labels).sum()
        loss.backward()
        results.append((loss, [p.grad.clone() for p in model.parameters()]))
    (whole, gradients), (chunked, chunked_gradients) = results
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-6)
    for one, two in zip(gradients, chunked_gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_folder_values_refuse_pickles_and_missing_parameters(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGS["gpt2"], "vocab_size": VOCAB}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"pytorch_model.bin.*run code"):
        FolderValues(tmp_path)
    save_file({"transformer.wte.weight": torch.zeros(VOCAB, 64)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"holds no parameter transformer\.wpe\.weight"):
        build(CONFIGS["gpt2"], FolderValues(tmp_path))
    save_file({"wte.weight": torch.zeros(7, 64)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"transformer.wte.weight: expected shape \[300, 64\], found \[7, 64\]"):
        build(CONFIGS["gpt2"], FolderValues(tmp_path))


def test_an_impossible_configuration_is_named():
    with pytest.raises(UserError, match=r"model\.config"):
        build({"model_type": "gtp2", **IDS})
