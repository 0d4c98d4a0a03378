"""Makes stores of real text, trained runs, and checkpoints written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import GPT2, LLAMA, NO_DROPOUT, tiny_json, tiny_recipe, train_on_ranks
from zeropipe.launcher.cli import main
from zeropipe.trainer.checkpoint.boxes import boxes_of_range
from zeropipe.trainer.checkpoint.files import box_tensor, write_bytes, write_json, write_rank
from zeropipe.trainer.checkpoint.folder import begin, partial_path, publish

VOCAB = 512
CONFIGS = {
    "gpt2": {**GPT2, **NO_DROPOUT},
    "llama": {**LLAMA, "tie_word_embeddings": False},
    "llama_tied": {**LLAMA, "tie_word_embeddings": True},
}


def make_store(path: Path, documents: int = 17) -> Path:
    limits = ["--limit-bytes", "300000", "--limit-documents", str(documents), "--workers", "0"]
    words = ["prepare", "--builtin", "stdlib", *limits, "--train-tokenizer", str(VOCAB), "--quiet"]
    assert main([*words, "--output", str(path)]) == 0
    return path


def run_recipe(store: Path, output: Path, config: dict[str, Any], **sections: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "model": {"config": config},
        "data": {"split": "8,1,1"},
        "eval": {"every": 3, "batches": 2},
        "save": {"every": 3},
    }
    return tiny_recipe(store, output, **{**defaults, **sections})


def train_run(store: Path, output: Path, family: str, zero: str, world: int, **extra: Any) -> Path:
    train_on_ranks(world, run_recipe(store, output, CONFIGS[family]), tiny_json(zero, **extra))
    return output


def fresh_model(config: dict[str, Any], seed: int = 0) -> Any:
    """A plain Hugging Face model with weights large enough for logits to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def write_run(
    run: Path,
    store: Path,
    model: Any,
    config: dict[str, Any],
    pieces: int = 2,
    precision: str = "fp32",
    probe_from: Any = None,
) -> Path:
    """A run directory whose one checkpoint holds `model`, its tensors cut into `pieces` flat ranges of as many files.

    `probe_from`: the model whose logits are recorded as those of training; `model` by default.
    """
    run.mkdir(parents=True)
    recipe = run_recipe(store, run, {k: v for k, v in config.items() if k != "vocab_size"})
    (run / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in model.state_dict()]
    tensors = dict(sorted([*model.named_parameters(), *buffers]))
    folder, step = run / "checkpoints", 1
    begin(folder, step)
    partial = partial_path(folder, step)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    files = {}
    for rank in range(pieces):
        entries = []
        for name, tensor in tensors.items():
            first, last = tensor.numel() * rank // pieces, tensor.numel() * (rank + 1) // pieces
            for box in boxes_of_range(first, last, shapes[name]):
                piece = tensor.detach().float()[box.slices].contiguous()
                entries.append(box_tensor("master", name, box, lambda piece=piece: piece))
        files |= write_rank(partial, rank, entries, shapes)
    state = {"step": step, "model_config": config, "precision": precision, "seq_len": 32, "global_batch": 8, "data": []}
    files["state.json"] = write_json(partial / "state.json", state)
    ids = (torch.arange(16)[None] * 31 + 1) % config["vocab_size"]
    with torch.no_grad():
        logits = (probe_from or model)(input_ids=ids).logits.float()
    files["probe.safetensors"] = write_bytes(partial / "probe.safetensors", save({"ids": ids, "logits": logits}))
    publish(folder, step, files)
    return run


def raw_tokens(store: Path) -> np.ndarray:
    """All tokens of a store of one shard, read without this project's code."""
    return np.fromfile(store / "shard-00000.bin", np.uint16).astype(np.int64)


def document_ends(store: Path) -> np.ndarray:
    """Running sum of document lengths, read from the .idx by the format's description alone."""
    raw = (store / "shard-00000.idx").read_bytes()
    count = int(np.frombuffer(raw, "<u8", 1, 18)[0])
    return np.cumsum(np.frombuffer(raw, "<i4", count, 34))
