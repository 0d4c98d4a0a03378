"""Every method of fine-tuning, killed at random instants and moved to other layouts: it ends as the undisturbed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.test_zero import run_for, worst
from tests.harness import run_ranks
from tests.tiny import LLAMA, _train, tiny_json, tiny_recipe, tiny_records, train_on_ranks
from zeropipe.trainer.checkpoint.reader import Checkpoint
from zeropipe.trainer.engine.base import Engine
from zeropipe.trainer.metrics.audit import audit, audit_text
from zeropipe.trainer.metrics.reading import read_metrics

pytestmark = pytest.mark.distributed
LORA = {"type": "lora", "r": 4, "alpha": 8}
METHODS: dict[str, dict[str, Any]] = {
    "sft": {"objective": "sft"},
    "sft+lora": {"objective": "sft", "adapter": LORA},
    "sft+qlora": {"objective": "sft", "adapter": {**LORA, "type": "qlora"}},
    "dpo": {"objective": "dpo"},
    "dpo+lora": {"objective": "dpo", "adapter": LORA},
}
KILLED = [pytest.param(method, 200, 10, marks=pytest.mark.slow) for method in METHODS]


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    return {kind: tiny_records(folder / kind, kind) for kind in ("sft", "dpo")}


def recipe_of(method: str, stores: dict[str, Path], output: Path, **sections: Any) -> dict[str, Any]:
    method_sections = {"model": {"config": LLAMA}, "data": {"seq_len": 64, "split": "1"}, **METHODS[method]}
    return tiny_recipe(stores[METHODS[method]["objective"]], output, **method_sections, **sections)


def holds(run: Path, total: int) -> str:
    """The audit's first line; fails unless every sample was consumed once, in order, to the last step."""
    found = audit(run)
    text = audit_text(found)
    assert found.steps == found.total_steps == total
    return text.splitlines()[0]


def same_bits(one: Path, other: Path) -> None:
    """The last checkpoints of two runs hold the same tensors and the same scalars."""
    first, second = Checkpoint.open(one), Checkpoint.open(other)
    assert first.step == second.step and first.names() == second.names()
    assert first.state["engine"] == second.state["engine"]
    for name in first.names():
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            assert torch.equal(first.read(name, kind), second.read(name, kind)), (name, kind)


@pytest.mark.parametrize(("method", "steps", "kills"), [("dpo+lora", 36, 2), *KILLED])
def test_killed_at_any_instant_it_resumes_and_ends_the_same(method, steps, kills, stores, tmp_path, record_property):
    """Dropout of the adapter included; DPO also dies while it computes what the model thought before training."""
    ds, sections = tiny_json("zero2", micro=2), {"duration": {"steps": steps}, "save": {"every": 1, "keep": 2}}
    recipe = recipe_of(method, stores, tmp_path / "killed", **sections)
    if "adapter" in recipe:
        recipe["adapter"] = {**recipe["adapter"], "dropout": 0.1}
    undisturbed = train_on_ranks(2, {**recipe, "output": str(tmp_path / "undisturbed")}, ds)
    rng, done = np.random.default_rng(len(method)), 0
    while done < kills and not run_for(rng.uniform(0.4, 1.2), recipe, ds):
        done += 1
    final = train_on_ranks(2, recipe, ds)
    record_property("kills", done)
    record_property("audit", holds(tmp_path / "killed", steps))
    assert done >= kills // 2 and Checkpoint.open(tmp_path / "killed").step == steps
    for key in ("loss", "grad_norm", "lr", "ledger", "samples"):
        assert final[key] == undisturbed[key]
    same_bits(tmp_path / "killed", tmp_path / "undisturbed")


def _train_to(step: int, recipe: dict[str, Any], ds: dict[str, Any]) -> int:
    """Trains, and is asked to stop in step `step`."""
    real = Engine.train_step

    def train_step(self: Any, stream: Any, number: int, stop: bool = False, save: bool = False) -> Any:
        return real(self, stream, number, stop or number + 1 == step)

    Engine.train_step = train_step  # type: ignore[method-assign]
    return _train(recipe, ds)


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=() if method == "sft+lora" else pytest.mark.slow) for method in METHODS]
)
def test_moved_to_other_layouts_in_the_middle_it_follows(method, stores, tmp_path, record_property):
    """Three steps each under ZeRO-2, as a pipeline of two stages, and under ZeRO-3, in one run directory."""
    recipe = recipe_of(method, stores, tmp_path / "moved", duration={"steps": 9})
    alone = train_on_ranks(2, {**recipe, "output": str(tmp_path / "alone")}, tiny_json("zero2", micro=2))
    for part, (stage, stages) in enumerate((("zero2", 1), ("zero1", 2), ("zero3", 1)), 1):
        on = {**recipe, "parallel": {"pipeline": stages}}
        assert run_ranks(2, _train_to, 3 * part, on, tiny_json(stage, 2)) == [3 * part] * 2
    losses = [record["loss"] for record in read_metrics(tmp_path / "moved") if record["kind"] == "train"]
    error = worst(losses, alone["loss"])
    record_property("worst relative loss error", error)
    record_property("audit", holds(tmp_path / "moved", 9))
    assert error < 1e-5
