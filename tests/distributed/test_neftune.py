"""NEFTune on every kind of layout against a plain PyTorch loop that adds the same noise to every record alone."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.distributed.test_sft import (
    BATCH,
    CLIP,
    PIPELINE,
    PLAIN,
    SEED,
    SEQUENCE,
    STEPS,
    TENSOR,
    learning_rate,
    plain_model,
    recipe_of,
    worst,
)
from tests.tiny import plan_of, tiny_json, tiny_records, train_on_ranks
from tests.unit.trainer.data.test_samples import raw_records
from zeropipe.data_prep.store import TRAINED
from zeropipe.trainer.data.samples import Packs, open_samples, sample_order
from zeropipe.trainer.metrics.reading import read_metrics

pytestmark = pytest.mark.distributed
ALPHA = 5.0
NEFTUNE = {"type": "sft", "neftune": ALPHA}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tiny_records(tmp_path_factory.mktemp("data") / "store")


def splitmix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, written once more: unsigned."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def noise(sample: int, record: int, places: int, width: int) -> torch.Tensor:
    """What is added to the embeddings of a record, from the definition."""
    key = int.from_bytes(hashlib.sha256(f"{SEED}/neftune/{sample}".encode()).digest()[:8], "little")
    step = np.uint64(0x9E3779B97F4A7C15)

    def counted(first: int, last: int) -> np.ndarray:
        return np.arange(first, last, dtype=np.uint64) * step

    of_record = splitmix(np.uint64(key) + counted(record, record + 1))
    of_place = splitmix(of_record + counted(0, places))
    hashed = splitmix(of_place[:, None] + counted(1, width + 1))
    high = (hashed >> np.uint64(40)).astype(np.int64)
    signed = np.where(high >= 1 << 23, high - (1 << 24), high)
    return torch.from_numpy((signed + 0.5) / 2**23 * ALPHA / np.sqrt(places * width)).float()


@cache
def plain_pytorch(model: str, store: Path, packing: str) -> list[float]:
    torch.set_num_threads(1)
    net, raw, losses = plain_model(model), raw_records(store), []
    matrices, vectors = ([p for p in net.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    plan = plan_of(recipe_of(store, store / "run", model, data={"packing": packing}), tiny_json(), 1)
    (packs,) = samples = open_samples(plan.recipe, "train")
    rows = sample_order(plan.recipe, samples).sample(np.arange(STEPS * BATCH))[1]
    assert isinstance(packs, Packs)
    embed: Any = net.get_input_embeddings()  # type: ignore[operator]
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        nats = []
        for sample in range(step * BATCH, (step + 1) * BATCH):
            for number, record in enumerate(packs.rows[int(rows[sample])]):
                tokens, flags = (torch.from_numpy(column.copy()) for column in raw[record])
                embedded = embed(tokens[None, :-1])
                logits = net(inputs_embeds=embedded + noise(sample, number, *embedded.shape[1:])).logits[0]
                own = F.cross_entropy(logits, tokens[1:], reduction="none")
                nats.append(own[(flags[1:] & TRAINED) > 0])
        loss = torch.cat(nats).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses


CASES = [
    ("gpt2", "zero0", 1, 2, "best_fit", PLAIN),
    pytest.param("gpt2", "zero2", 2, 4, "none", PLAIN, marks=pytest.mark.slow),
    pytest.param("gpt2", "zero1", 2, 2, "none", PIPELINE, marks=pytest.mark.slow),
    ("llama", "zero3", 2, 1, "best_fit", PLAIN),
    pytest.param("llama", "zero1", 2, 2, "best_fit", TENSOR, marks=pytest.mark.slow),
    ("llama", "zero3", 2, 4, "best_fit", SEQUENCE),
    ("llama", "zero1", 4, 2, "best_fit", PIPELINE),
    pytest.param("llama", "zero1", 2, 4, "none", SEQUENCE, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("model", "stage", "world", "micro", "packing", "layout"), CASES)
def test_twenty_steps_follow_plain_pytorch(model, stage, world, micro, packing, layout, store, tmp_path):
    recipe = recipe_of(store, tmp_path / "run", model, data={"packing": packing}, objective=NEFTUNE, **layout["recipe"])
    run = train_on_ranks(world, recipe, tiny_json(stage, micro, **layout["ds"]))
    assert worst(run["loss"], plain_pytorch(model, store, packing)) < 1e-6


def test_evaluations_have_none(store, tmp_path):
    """At a rate of next to nothing the model stays what it was, and noise moves the loss of training alone."""
    still = {"optimizer": {"lr": 1e-30}, "duration": {"steps": 2}, "eval": {"every": 1}}
    seen = {}
    for name, objective in (("with", NEFTUNE), ("without", "sft")):
        recipe = recipe_of(store, tmp_path / name, "llama", objective=objective, **still)
        recipe["data"]["split"] = "80,20"
        train_on_ranks(2, recipe, tiny_json("zero1"))
        records = read_metrics(tmp_path / name)
        seen[name] = {kind: [r["loss"] for r in records if r["kind"] == kind] for kind in ("train", "eval")}
    assert seen["with"]["eval"] == seen["without"]["eval"] and len(seen["with"]["eval"]) == 2
    assert worst(seen["with"]["train"], seen["without"]["train"]) > 1e-5


def test_a_resume_is_the_same_bit_for_bit(store, tmp_path):
    def run(name: str, **sections: Any) -> list[float]:
        recipe = recipe_of(store, tmp_path / name, objective=NEFTUNE, **sections)
        return train_on_ranks(2, recipe, tiny_json("zero2", 2))["loss"]

    whole = run("whole", save={"every": 7, "keep": 9})
    assert run("rest", resume=str(tmp_path / "whole/checkpoints/step-00000007")) == whole[7:]
