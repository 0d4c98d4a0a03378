"""Learning rates of single groups of parameters against plain torch, on every kind of layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from zeropipe.trainer.testing.curves import plain_model, whole_batch
from zeropipe.trainer.testing.plain import Curve, train_plainly

pytestmark = pytest.mark.distributed

MODELS = {"gpt2": {**tiny.GPT2, **tiny.NO_DROPOUT}, "llama": {**tiny.LLAMA, "tie_word_embeddings": False}}
LAYOUTS: dict[str, tuple[int, str, dict[str, Any], int]] = {
    "one": (1, "zero0", {}, 1),
    "dp2-zero1": (2, "zero1", {}, 1),
    "dp2-zero3": (2, "zero3", {}, 1),
    "tp2": (2, "zero1", {"tensor_parallel": {"autotp_size": 2}}, 1),
    "pp2": (2, "zero1", {}, 2),
}
VOCABULARY = ("embed_tokens.weight", "wte.weight", "lm_head.weight")


def recipe_of(model: str, folder: Path, stages: int = 1, run: str = "run", **sections: Any) -> dict[str, Any]:
    own = {
        "model": {"config": MODELS[model]},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.1, "embedding_lr": 1e-4},
        "schedule": {"type": "cosine", "warmup": 2, "min_lr": 1e-4},
        "parallel": {"pipeline": stages},
    }
    return tiny.tiny_recipe(folder / "store", folder / run, **{**own, **sections})


def plain(recipe: dict[str, Any]) -> Curve:
    from zeropipe.trainer.engine.base import planned_rate
    from zeropipe.trainer.ranks.ranks import Ranks
    from zeropipe.trainer.run.data import RunData

    plan = tiny.plan_of(recipe, tiny.tiny_json(micro=8), 1)
    model = plain_model(plan)
    slow = [p for name, p in model.named_parameters() if name.endswith(VOCABULARY)]
    others = [p for name, p in model.named_parameters() if not name.endswith(VOCABULARY)]
    groups = [
        {"params": slow, "weight_decay": 0.1, "ratio": 0.1},
        {"params": [p for p in others if p.ndim > 1], "weight_decay": 0.1, "ratio": 1.0},
        {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0, "ratio": 1.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)

    def set_rate(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = planned_rate(plan, step) * group["ratio"]

    with RunData.open(plan).stream(Ranks()) as stream:
        batches = (whole_batch(stream.next_step(), torch.device("cpu")) for _ in range(plan.total_steps))
        return train_plainly(model, batches, optimizer, 0.3, set_rate)


def train(model: str, folder: Path, layout: str, run: str = "run", **sections: Any) -> dict[str, Any]:
    world, zero, extra, stages = LAYOUTS[layout]
    return tiny.train_on_ranks(world, recipe_of(model, folder, stages, run, **sections), tiny.tiny_json(zero, **extra))


@pytest.mark.parametrize("model", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_embedding_and_head_learn_at_their_own_rate(model, tmp_path):
    tiny.tiny_store(tmp_path / "store")
    truth = plain(recipe_of(model, tmp_path))
    for layout in LAYOUTS:
        found = train(model, tmp_path, layout, layout)
        assert found["loss"] == pytest.approx(truth.losses, rel=1e-6), layout
        assert found["grad_norm"] == pytest.approx(truth.norms, rel=1e-5), layout
        assert max(found["lr"]) == 1e-3  # what is reported is that of the others


def test_a_resume_keeps_the_rates(tmp_path):
    tiny.tiny_store(tmp_path / "store")
    constant = {"schedule": {"type": "constant", "warmup": 0}}
    whole = train("llama", tmp_path, "dp2-zero1", "whole", **constant)
    train("llama", tmp_path, "dp2-zero1", duration={"steps": 3}, **constant)
    assert train("llama", tmp_path, "dp2-zero1", **constant)["loss"] == whole["loss"]
    train("llama", tmp_path, "pp2", "other", duration={"steps": 3}, **constant)
    found = train("llama", tmp_path, "dp2-zero3", "other", **constant)
    assert found["loss"] == pytest.approx(whole["loss"], rel=1e-6)
