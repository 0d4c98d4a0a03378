"""Label smoothing and z-loss against their formulas in plain torch, on every layout; evaluations leave them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.distributed.test_sft import BATCH, SEQ, plain_model, recipe_of
from tests.tiny import plan_of, tiny_json, tiny_records, train_on_ranks
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.data.batches import BatchShape, make_batch
from zeropipe.trainer.data.samples import open_samples, sample_order
from zeropipe.trainer.metrics.reading import read_metrics
from zeropipe.trainer.objectives.registry import objective_of

SMOOTHING, Z = 0.1, 1e-2
OBJECTIVE = {"type": "sft", "label_smoothing": SMOOTHING, "z_loss": Z}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tiny_records(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module")
def expected(store) -> tuple[float, float, float]:
    """Loss of the first step with and without the penalties, and the norm of its gradient."""
    plan = plan_of(recipe_of(store, store / "run", "llama", objective=OBJECTIVE), tiny_json(), 1)
    samples = open_samples(plan.recipe, "train")
    _, rows = sample_order(plan.recipe, samples).sample(np.arange(BATCH))
    batch = make_batch([(samples[0], int(row)) for row in rows], BatchShape(BATCH, 1, BATCH, SEQ, 500))
    net = plain_model("llama")
    logits = (
        net(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits.flatten(0, 1).double()
    )
    labels = batch.labels.flatten()
    log_p = logits.log_softmax(-1)[labels >= 0]
    right = -log_p.gather(1, labels[labels >= 0][:, None])[:, 0]
    norm = logits.logsumexp(-1)[labels >= 0]
    loss = ((1 - SMOOTHING) * right - SMOOTHING * log_p.mean(-1) + Z * norm**2).mean()
    loss.backward()
    size = float(torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None]))
    return loss.item(), F.cross_entropy(logits, labels).item(), size


LAYOUTS: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
    ("zero1", 2, {}, {}),
    ("zero3", 2, {}, {"sequence_parallel_size": 2}),
    ("zero1", 2, {"parallel": {"pipeline": 2}}, {}),
    ("zero1", 2, {}, {"tensor_parallel": {"autotp_size": 2}}),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "world", "sections", "extra"), LAYOUTS)
def test_training_adds_them_and_evaluation_does_not(stage, world, sections, extra, store, expected, tmp_path):
    recipe = recipe_of(
        store,
        tmp_path / "run",
        "llama",
        objective=OBJECTIVE,
        duration={"steps": 1},
        optimizer={"lr": 1e-12},
        schedule={"type": "constant", "warmup": 0},
        eval={"every": 1, "sets": {"all": [{"store": str(store)}]}},
        **sections,
    )
    train_on_ranks(world, recipe, tiny_json(stage, 2, **extra))
    train, held_out = (
        next(r for r in read_metrics(tmp_path / "run") if r["kind"] == kind) for kind in ("train", "eval")
    )
    assert train["loss"] == pytest.approx(expected[0], rel=1e-6)
    assert train["grad_norm"] == pytest.approx(expected[2], rel=1e-5)
    assert held_out["split"] == "all" and abs(held_out["loss"] - expected[1]) < 0.2 < expected[0] - expected[1]


@pytest.mark.parametrize("value", [1.0, -0.1, True, "much"])
def test_what_is_no_share_is_refused(value):
    with pytest.raises(UserError, match=r"objective.z_loss .*: must be a number from 0 to below 1"):
        objective_of({"type": "sft", "z_loss": value})
