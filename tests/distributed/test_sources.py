"""Loss and tokens of each source of a mixture: of plain transformers, row by row, and the same on every layout."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from tests.harness import run_ranks
from zeropipe.trainer.metrics.reading import read_metrics
from zeropipe.trainer.page.collect import collect
from zeropipe.trainer.testing.curves import plain_model, whole_batch

pytestmark = pytest.mark.distributed
STEPS = 4
LAYOUTS: dict[str, tuple[int, str, int, dict[str, Any], dict[str, Any]]] = {
    "zero2": (2, "zero2", 1, {}, {}),
    "pipeline": (2, "zero1", 2, {}, {"parallel": {"pipeline": 2}}),
    "zero3-4": (4, "zero3", 2, {}, {}),
    "tensor": (2, "zero1", 4, {"tensor_parallel": {"autotp_size": 2}}, {}),
    "sequence": (2, "zero1", 2, {"sequence_parallel_size": 2}, {}),
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sources")
    return [tiny.tiny_store(folder / name, seed=seed) for seed, name in enumerate(("web", "code"))]


def recipe_for(stores: list[Path], run: Path, **sections: Any) -> dict[str, Any]:
    """Three samples of one to one of the other, each of as many labels as it has documents to end."""
    train = [{"store": str(store), "weight": weight} for store, weight in zip(stores, (3, 1), strict=True)]
    data = {"train": train, "document_mask": True}
    return tiny.tiny_recipe(stores[0], run, data=data, duration={"steps": STEPS}, **sections)


def expected(recipe: dict[str, Any], ds: dict[str, Any], stores: list[Path]) -> list[dict[str, tuple[float, int]]]:
    """By transformers' model on the whole global batch; a row is of the store whose file holds its tokens."""
    from zeropipe.trainer.engine.base import planned_rate
    from zeropipe.trainer.ranks.ranks import init_distributed
    from zeropipe.trainer.run.data import RunData
    from zeropipe.trainer.testing.plain import decayed_groups

    held = {s.name: b"".join(file.read_bytes() for file in sorted(s.glob("*.bin"))) for s in stores}
    plan, ranks, found = tiny.plan_of(recipe, ds, 1), init_distributed(), []
    params, model = plan.deepspeed["optimizer"]["params"], plain_model(plan)
    groups = decayed_groups(model.parameters(), params["weight_decay"])
    optimizer = torch.optim.AdamW(groups, lr=params["lr"], betas=tuple(params["betas"]), eps=params["eps"])
    with RunData.open(plan).stream(ranks) as stream:
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = planned_rate(plan, step)
            ids, labels, positions = whole_batch(stream.next_step(), ranks.device)
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            nats = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
            own: dict[str, list[float]] = {name: [0.0, 0] for name in held}
            for row, loss, label in zip(ids, nats, labels, strict=True):
                (name,) = (name for name, raw in held.items() if row.numpy().astype(np.uint16).tobytes() in raw)
                own[name][0] += float(loss.sum())
                own[name][1] += int((label >= 0).sum())
            found.append({name: (total / tokens, int(tokens)) for name, (total, tokens) in own.items() if tokens})
            (nats.sum() / (labels >= 0).sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), plan.settings.clipping)
            optimizer.step()
            optimizer.zero_grad()
    return found


@functools.cache
def truth(*stores: Path) -> list[dict[str, tuple[float, int]]]:
    recipe = recipe_for(list(stores), stores[0].parent / "truth")
    return run_ranks(1, expected, recipe, tiny.tiny_json(micro=8), list(stores))[0]


@pytest.mark.parametrize(
    "layout",
    ["zero2", "pipeline", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero3-4", "tensor", "sequence"))],
)
def test_each_source_has_its_own_loss(layout, stores, tmp_path):
    world, zero, micro, ds, sections = LAYOUTS[layout]
    recipe = recipe_for(stores, tmp_path / "run", **sections)
    run_ranks(world, tiny._train, recipe, tiny.tiny_json(zero, micro, **ds))
    records = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    assert len(records) == len(truth(*stores)) == STEPS
    for record, theirs in zip(records, truth(*stores), strict=True):
        assert {name for name in record if name.startswith("source/")} == {
            f"source/{name}/{what}" for name in theirs for what in ("loss", "tokens")
        }
        for name, (loss, tokens) in theirs.items():
            assert record[f"source/{name}/tokens"] == tokens
            assert record[f"source/{name}/loss"] == pytest.approx(loss, rel=2e-6)
        whole = sum(loss * tokens for loss, tokens in theirs.values()) / sum(tokens for _, tokens in theirs.values())
        assert record["loss"] == pytest.approx(whole, rel=2e-6)
    (figure,) = (own for own in collect(tmp_path / "run", 1000)["figures"] if own["key"] == "sources")
    assert [line["label"] for line in figure["lines"]] == ["web", "code"]
