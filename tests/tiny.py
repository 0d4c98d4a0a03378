"""A tiny store of learnable tokens, tiny recipes, and training them on real ranks: what engine tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.harness import run_ranks
from zeropipe.data_prep.index import flagged
from zeropipe.data_prep.manifest import Manifest, RecordsInfo
from zeropipe.data_prep.store import BEGINS, TRAINED
from zeropipe.data_prep.writer import ShardWriter

VOCAB = 500
EOD = 0
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 64}
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
STAGES: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero2_offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero3_offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}


def tiny_store(path: Path, documents: int = 300, vocab: int = VOCAB, seed: int = 0) -> Path:
    """A store without a tokenizer: documents of 5–60 tokens in which each token often decides the next."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 60, documents)
    path.mkdir(parents=True)
    with ShardWriter(path, np.dtype(np.uint16), shard_bytes=1 << 12) as writer:
        for length in lengths:
            tokens = rng.integers(1, vocab, length)
            for i in range(1, length):
                if rng.random() < 0.7:
                    tokens[i] = tokens[i - 1] * 7 % (vocab - 1) + 1
            tokens[-1] = EOD
            writer.append(tokens.astype(np.uint16), np.array([length]))
    tokens = int(lengths.sum())
    Manifest("uint16", vocab, "<eod>", EOD, documents, tokens, tokens * 4, writer.records).save(path)
    return path


def tiny_records(
    path: Path, kind: str = "sft", records: int = 120, longest: int = 28, seed: int = 0, vocab: int = VOCAB
) -> Path:
    """A store of records of very different lengths: a prompt, and an answer (of a pair: two) that follows from it."""
    rng = np.random.default_rng(seed)
    total, sizes = 0, []
    path.mkdir(parents=True)
    with ShardWriter(path, flagged(np.dtype(np.uint16)), shard_bytes=1 << 11) as writer:
        for _ in range(records):
            prompt = rng.integers(1, vocab, rng.integers(1, 6))
            texts = []
            for factor in (7, 11)[: 2 if kind == "dpo" else 1]:
                answer = (
                    prompt[-1] * factor ** np.arange(1, rng.integers(1, longest - len(prompt)) + 1) % (vocab - 1) + 1
                )
                text = np.zeros(len(prompt) + len(answer) + 1, flagged(np.dtype(np.uint16)))
                text["token"] = [*prompt, *answer, EOD]
                text["flags"][len(prompt) :] = TRAINED
                text["flags"][0] |= BEGINS
                texts.append(text)
            document = np.concatenate(texts)
            writer.append(document, np.array([len(document)]))
            total, sizes = total + len(document), [*sizes, len(document)]
    info = RecordsInfo(kind, max(sizes), [EOD])
    Manifest("uint16", vocab, None, None, records, total, total * 4, writer.records, records=info).save(path)
    return path


def tiny_recipe(store: Path, output: Path, **sections: Any) -> dict[str, Any]:
    """A recipe as a mapping; `sections` replace or extend the defaults one level deep."""
    recipe: dict[str, Any] = {
        "name": "tiny",
        "output": str(output),
        "model": {"config": {**GPT2, **NO_DROPOUT}},
        "data": {"train": [{"store": str(store)}], "split": "90,10", "seq_len": 32},
        "batch": {"global": 8},
        "duration": {"steps": 6},
        "optimizer": {"lr": 1.0e-3, "weight_decay": 0.1},
        "schedule": {"type": "cosine", "warmup": 2},
        "log": {"every": 100},
        "eval": {"every": 0},
        "save": {"every": 0, "keep": 10},
    }
    for key, value in sections.items():
        recipe[key] = {**recipe[key], **value} if isinstance(value, dict) and key in recipe else value
    return recipe


def tiny_json(zero: str = "zero0", micro: int = 2, **extra: Any) -> dict[str, Any]:
    # 0.3 clips every step of the tiny models: above the norm, clipping hides nothing
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_clipping": 0.3,
        "zero_optimization": dict(STAGES[zero]),
        **extra,
    }


def train_on_ranks(world: int, recipe: dict[str, Any], ds: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """Trains in fresh processes; returns the step, and losses, gradient norms and rates by step, from metrics.jsonl."""
    (step, *_) = run_ranks(world, _train, recipe, ds, **kwargs)
    from zeropipe.trainer.metrics.reading import read_metrics

    records = [record for record in read_metrics(recipe["output"]) if record["kind"] == "train"]
    columns = ("loss", "grad_norm", "lr", "ledger", "samples")
    return {"step": step, **{column: [record[column] for record in records] for column in columns}}


def _train(recipe: dict[str, Any], ds: dict[str, Any]) -> int:
    from zeropipe.trainer.loop import train
    from zeropipe.trainer.ranks.ranks import join_world
    from zeropipe.trainer.run.quiet import quiet

    quiet()
    ranks = join_world()
    plan = plan_of(recipe, ds, ranks.world)
    layout = plan.layout
    return train(plan, ranks.lay_out(layout.tensor, layout.sequence, layout.pipeline, layout.expert)).step


def plan_of(recipe: dict[str, Any], ds: dict[str, Any], world: int) -> Any:
    from zeropipe.trainer.plan.plan import make_plan
    from zeropipe.trainer.recipe.recipe import Recipe

    return make_plan(Recipe.model_validate(recipe), ds, world)


def folder_of_zeros(path: Path, config: dict[str, Any]) -> Path:
    """A Hugging Face folder of a model whose weights are all zero; needs no torch."""
    import json

    from safetensors.numpy import save_file

    from zeropipe.trainer.families.specs import parameter_table

    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    weights = {spec.name: np.zeros(spec.shape, np.float16) for spec in parameter_table(config)}
    save_file(weights, path / "model.safetensors")
    return path


def write_pair(folder: Path, recipe: dict[str, Any], ds: dict[str, Any]) -> tuple[Path, Path]:
    """The recipe and JSON as files, for tests that go through the command line."""
    import json

    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "ds.json").write_text(json.dumps(ds))
    return folder / "recipe.yaml", folder / "ds.json"
