"""Fine-tuning on records against a plain PyTorch loop that takes every record alone, on every kind of layout."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import (
    GPT2,
    LLAMA,
    NO_DROPOUT,
    VOCAB,
    plan_of,
    tiny_json,
    tiny_recipe,
    tiny_records,
    train_on_ranks,
)
from tests.unit.trainer.data.test_samples import raw_records
from zeropipe.data_prep.store import TRAINED
from zeropipe.trainer.data.samples import Packs, open_samples, sample_order
from zeropipe.trainer.families.specs import parameter_table
from zeropipe.trainer.modeling.values import RandomValues

pytestmark = pytest.mark.distributed
STEPS, SEED, BATCH, SEQ, CLIP = 20, 1234, 8, 32, 0.3
MODELS = {"gpt2": {**GPT2, **NO_DROPOUT}, "llama": LLAMA}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tiny_records(tmp_path_factory.mktemp("data") / "store")


def recipe_of(store: Path, output: Path, model: str = "gpt2", **sections: Any) -> dict[str, Any]:
    sections = {"duration": {"steps": STEPS}, "objective": "sft", **sections}
    sections["data"] = {"seq_len": SEQ, "split": "1", **sections.get("data", {})}
    return tiny_recipe(store, output, model={"config": MODELS[model]}, **sections)


def plain_model(model: str) -> nn.Module:
    config = {**MODELS[model], "vocab_size": VOCAB}
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="sdpa")
    values, own = RandomValues(SEED), dict(net.named_parameters())
    with torch.no_grad():
        for spec in parameter_table(config):
            own[spec.name].copy_(values(spec))
    return net


def learning_rate(step: int) -> float:
    if step < 2:
        return 1e-3 * (step + 1) / 2
    return 1e-3 * 0.5 * (1 + math.cos(math.pi * (step - 1) / (STEPS - 1)))


@cache
def plain_pytorch(model: str, store: Path, packing: str, mean_of_means: bool = False) -> list[float]:
    """Every record in a forward pass of its own, unpadded; the loss is a mean over all trained tokens of the batch.

    `mean_of_means`: the usual mistake, a mean over micro batches of two samples of their own means.
    """
    torch.set_num_threads(1)
    net, raw, losses = plain_model(model), raw_records(store), []
    matrices, vectors = ([p for p in net.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    plan = plan_of(recipe_of(store, store / "run", model, data={"packing": packing}), tiny_json(), 1)
    samples = open_samples(plan.recipe, "train")
    rows, packs = sample_order(plan.recipe, samples).sample(np.arange(STEPS * BATCH))[1], samples[0]
    assert isinstance(packs, Packs)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        micros, loss = [], torch.zeros(())
        for first in range(step * BATCH, (step + 1) * BATCH, 2):
            nats = []
            for record in np.concatenate([packs.rows[int(rows[k])] for k in (first, first + 1)]):
                tokens, flags = (torch.from_numpy(column.copy()) for column in raw[record])
                logits = net(tokens[None]).logits[0, :-1]
                own = F.cross_entropy(logits, tokens[1:], reduction="none")
                nats.append(own[(flags[1:] & TRAINED) > 0])
            micros.append(torch.cat(nats))
        loss = torch.stack([m.mean() for m in micros]).mean() if mean_of_means else torch.cat(micros).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses


def worst(losses: list[float], reference: list[float]) -> float:
    assert len(losses) == len(reference)
    return max(abs(a - b) / b for a, b in zip(losses, reference, strict=True))


PIPELINE, SEQUENCE, TENSOR = (
    {"recipe": {"parallel": {"pipeline": 2}}, "ds": {}},
    {"recipe": {}, "ds": {"sequence_parallel_size": 2}},
    {"recipe": {}, "ds": {"tensor_parallel": {"autotp_size": 2}}},
)
PLAIN: dict[str, Any] = {"recipe": {}, "ds": {}}
CASES = [
    ("gpt2", "zero0", 1, 2, "best_fit", PLAIN),
    ("gpt2", "zero1", 2, 1, "none", PLAIN),
    pytest.param("gpt2", "zero2", 4, 2, "best_fit", PLAIN, marks=pytest.mark.slow),
    ("gpt2", "zero3", 2, 2, "none", PLAIN),
    ("llama", "zero1", 2, 4, "best_fit", PLAIN),
    ("llama", "zero3", 4, 1, "none", PLAIN),
    ("llama", "zero0", 2, 2, "best_fit", PIPELINE),
    pytest.param("gpt2", "zero1", 4, 2, "none", PIPELINE, marks=pytest.mark.slow),
    ("llama", "zero2", 2, 2, "none", SEQUENCE),
    ("llama", "zero1", 2, 4, "best_fit", TENSOR),
    ("llama", "zero3", 2, 4, "best_fit", SEQUENCE),
]


@pytest.mark.parametrize(("model", "stage", "world", "micro", "packing", "layout"), CASES)
def test_twenty_steps_follow_plain_pytorch(model, stage, world, micro, packing, layout, store, tmp_path):
    recipe = recipe_of(store, tmp_path / "run", model, data={"packing": packing}, **layout["recipe"])
    run = train_on_ranks(world, recipe, tiny_json(stage, micro, **layout["ds"]))
    assert worst(run["loss"], plain_pytorch(model, store, packing)) < 1e-6


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_a_mean_of_means_would_not_pass(store, packing):
    right, wrong = (plain_pytorch("gpt2", store, packing, mistake) for mistake in (False, True))
    assert worst(wrong, right) > 1e-4


def test_a_resume_is_the_same_bit_for_bit(store, tmp_path):
    def run(name: str, **sections: Any) -> list[float]:
        recipe = recipe_of(store, tmp_path / name, **sections)
        return train_on_ranks(2, recipe, tiny_json("zero2", 2))["loss"]

    whole = run("whole")
    recipe = recipe_of(store, tmp_path / "parts", save={"every": 7, "keep": 9})
    train_on_ranks(2, recipe, tiny_json("zero2", 2))
    step = tmp_path / "parts" / "checkpoints" / "step-00000007"
    resumed = recipe_of(store, tmp_path / "resumed", resume=str(step))
    again = train_on_ranks(2, resumed, tiny_json("zero2", 2))["loss"]
    assert again == whole[7:]
    other = recipe_of(store, tmp_path / "other", resume=str(step), parallel={"pipeline": 2})
    changed = train_on_ranks(2, other, tiny_json("zero1", 2))["loss"]
    assert worst(changed, whole[7:]) < 1e-6
