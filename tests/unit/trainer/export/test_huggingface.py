"""Exports against the live training engine's logits, on every ZeRO stage; and what an export refuses."""

import json
import shutil
from io import BytesIO
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.unit.trainer.runs import CONFIGS, VOCAB, fresh_model, train_run, write_run
from zeropipe.data_prep.errors import UserError
from zeropipe.launcher.cli import main
from zeropipe.launcher.rehearsal.small import small_sizes
from zeropipe.trainer.checkpoint.reader import Checkpoint
from zeropipe.trainer.export.huggingface import BOUNDS, export, verify_logits

SMALL = {**CONFIGS["gpt2"], "vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}


def probe_of(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    with safe_open(Checkpoint.find(run) / "probe.safetensors", "pt") as file:
        return file.get_tensor("ids"), file.get_tensor("logits")


def contents(folder: Path) -> dict[str, bytes]:
    """Its files, but for what tells of the run."""
    told = ("README.md", "provenance.json")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in told}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "zero", "world"),
    [
        ("llama", "zero0", 1),
        ("llama_tied", "zero2", 2),
        ("gpt2", "zero3", 2),
        ("llama", "zero3_offload", 2),
    ],
)
def test_the_reloaded_model_is_the_trained_one(family, zero, world, text_store, tmp_path):
    check(train_run(text_store, tmp_path / "run", family, zero, world))


def test_the_reloaded_gpt2_is_the_trained_one(gpt2_run, tmp_path):
    check(gpt2_run, tmp_path / "export")


def check(run: Path, output: Path | None = None) -> None:
    done = export(run, output)
    ids, trained = probe_of(run)
    model = AutoModelForCausalLM.from_pretrained(done.folder)
    assert model.dtype == torch.float32 and model.config.vocab_size == VOCAB == trained.shape[-1]
    with torch.no_grad():
        logits = model(ids).logits
    assert (logits - trained).abs().max() <= 1e-5 * trained.abs().max()
    assert done.deviation is not None and done.deviation <= 1e-5 == done.bound
    # trained weights, not initial ones: the record of step 3 differs
    earlier = Checkpoint.open(run / "checkpoints" / "step-00000003")
    weights = dict(model.named_parameters())
    assert set(weights) == set(earlier.names())
    assert all(not torch.equal(weights[name], earlier.read(name)) for name in weights)


def test_the_folder_is_complete(gpt2_run, text_store, tmp_path):
    done = export(gpt2_run, tmp_path / "export")
    assert done.files == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "provenance.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    tokenizer = AutoTokenizer.from_pretrained(done.folder)
    assert tokenizer.decode(tokenizer("def f(x):\n    return x")["input_ids"]) == "def f(x):\n    return x"
    stored = load_file(done.folder / "model.safetensors")
    assert stored["transformer.wte.weight"].shape[0] == VOCAB and "lm_head.weight" not in stored
    config = json.loads((done.folder / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"] and config["eos_token_id"] == tokenizer.eos_token_id


def test_the_same_bytes_whatever_the_layout(text_store, tmp_path):
    model = fresh_model(SMALL)
    exported = [
        contents(export(write_run(tmp_path / str(pieces), text_store, model, SMALL, pieces)).folder)
        for pieces in (1, 2, 5)
    ]
    assert exported[0] == exported[1] == exported[2]


def test_shards_load_as_one_model(text_store, tmp_path):
    model = fresh_model(SMALL)
    run = write_run(tmp_path / "run", text_store, model, SMALL)
    done = export(run, shard_bytes=100_000)
    assert "model.safetensors.index.json" in done.files
    parts = sorted(done.folder.glob("model-*.safetensors"))
    assert len(parts) > 3 and parts[0].name == f"model-00001-of-{len(parts):05d}.safetensors"
    assert all(part.stat().st_size < 140_000 for part in parts)  # one embedding is larger than the limit
    loaded = AutoModelForCausalLM.from_pretrained(done.folder)
    expected = dict(model.named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in loaded.named_parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_the_rounded_master(dtype, text_store, tmp_path):
    model = fresh_model(SMALL)
    done = export(write_run(tmp_path / "run", text_store, model, SMALL), dtype=dtype)
    stored = load_file(done.folder / "model.safetensors")
    rounded = {name: p.detach().to(getattr(torch, dtype)) for name, p in model.named_parameters()}
    assert all(torch.equal(stored[name], rounded[name]) for name in rounded)
    assert 0 < done.deviation < BOUNDS[getattr(torch, dtype)]
    assert AutoModelForCausalLM.from_pretrained(done.folder).dtype == getattr(torch, dtype)


def test_a_bf16_run_exports_bf16(text_store, tmp_path):
    run = train_run(text_store, tmp_path / "run", "gpt2", "zero2", 1, bf16={"enabled": True})
    done = export(run)
    assert done.dtype == torch.bfloat16 and done.deviation <= done.bound == BOUNDS[torch.bfloat16]


def test_other_logits_than_training_are_refused(text_store, tmp_path):
    """The weights read back bit for bit; only the comparison with training can see that the model is another one."""
    model = fresh_model(SMALL)
    other = fresh_model({**SMALL, "n_head": 2})
    other.load_state_dict(model.state_dict())
    run = write_run(tmp_path / "run", text_store, model, SMALL, probe_from=other)
    with pytest.raises(UserError, match=r"differ from those of training.*worst at position \d+, token \d+"):
        export(run)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "recipe.yaml"]


def test_a_tensor_that_reads_back_other_is_refused(text_store, tmp_path, monkeypatch):
    import zeropipe.trainer.export.huggingface as module

    original = module.write_safetensors

    def damaged(file, tensors):
        written = BytesIO()
        original(written, tensors)
        data = bytearray(written.getvalue())
        data[-3] ^= 1
        file.write(data)

    monkeypatch.setattr(module, "write_safetensors", damaged)
    run = write_run(tmp_path / "run", text_store, fresh_model(SMALL), SMALL)
    with pytest.raises(UserError, match=r"transformer.wte.weight|transformer.wpe.weight.*reads back other"):
        export(run)
    assert not (run / "export").exists()


def test_an_existing_folder_is_kept_unless_told(text_store, tmp_path, capsys):
    run = write_run(tmp_path / "run", text_store, fresh_model(SMALL), SMALL)
    output = tmp_path / "mine"
    output.mkdir()
    (output / "notes.txt").write_text("keep me")
    assert main(["export", str(run), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert str(output) in error and "--overwrite" in error and error.count("\n") == 1
    assert [path.name for path in output.iterdir()] == ["notes.txt"]
    assert main(["export", str(run), "--output", str(output), "--overwrite"]) == 0
    assert "verified: logits within" in capsys.readouterr().out
    assert not (output / "notes.txt").exists() and (output / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "run"]


def test_a_damaged_checkpoint_is_not_exported(text_store, tmp_path, capsys):
    run = write_run(tmp_path / "run", text_store, fresh_model(SMALL), SMALL)
    file = Checkpoint.find(run) / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)
    assert main(["export", str(run)]) == 2
    assert "rank-00001.safetensors" in capsys.readouterr().err
    assert not (run / "export").exists()


def test_a_damaged_checkpoint_is_passed_over_where_there_is_one_before_it(gpt2_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(gpt2_run, run)
    file = run / "checkpoints" / "step-00000006" / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)
    assert main(["export", str(run)]) == 0
    captured = capsys.readouterr()
    assert "exported step 3" in captured.out
    assert captured.err.startswith("warning: damaged checkpoint") and str(file) in captured.err
    assert "taking step-00000003" in captured.err
    assert main(["export", str(run), "--checkpoint", "6", "--overwrite"]) == 2  # asked for by name


def test_an_export_of_a_chosen_step(gpt2_run, tmp_path, capsys):
    assert main(["export", str(gpt2_run), "--checkpoint", "3", "--output", str(tmp_path / "three")]) == 0
    assert "exported step 3" in capsys.readouterr().out
    assert main(["export", str(gpt2_run), "--checkpoint", "4", "--output", str(tmp_path / "four")]) == 2
    assert "no checkpoint at step 4; there are 3, 6" in capsys.readouterr().err


def test_a_model_without_attention_that_has_a_cache_is_verified():
    """transformers' cache cannot say how long it is where every layer's attention is linear."""
    linear = ["linear_attention"] * 2
    config = AutoConfig.for_model("qwen3_5_text", **small_sizes("qwen3_5_text"), layer_types=linear, vocab_size=VOCAB)
    torch.manual_seed(0)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.arange(8)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    assert verify_logits(lambda: model, ids, expected, 0.0, torch.device("cpu")) == 0.0
    with pytest.raises(ValueError, match="LinearAttention"):  # if this does not raise any more, this test is not needed
        model(input_ids=ids)
