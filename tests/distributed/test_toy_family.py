"""A model family from one file of its own trains, saves, resumes and exports like ours, against plain Hugging Face."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.distributed import layouts, reference
from tests.distributed.reference import Curve, assert_same, llama
from tests.harness import RankFailed, run_ranks
from tests.toys.family import NAME, TOY, ToyForCausalLM
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.checkpoint.reader import Checkpoint
from zeropipe.trainer.export.huggingface import export
from zeropipe.trainer.families.family import Family
from zeropipe.trainer.families.registry import FAMILIES
from zeropipe.trainer.metrics.reading import read_metrics
from zeropipe.trainer.plan.layout import Layout

pytestmark = pytest.mark.distributed

CONFIG = llama(model_type=NAME)
TP2, PP2 = Layout(world=2, data=1, tensor=2, zero_stage=1), Layout(world=2, data=1, pipeline=2, zero_stage=1)
LAYOUTS = {
    "one": Layout(world=1, data=1, zero_stage=1),
    "dp2-zero3": Layout(world=2, data=2, zero_stage=3),
    "tp2": TP2,
    "pp2": PP2,
    "sp2": Layout(world=2, data=1, sequence=2, zero_stage=2),
}
GATES = {name: fed for name, fed in TOY.feeds.items() if name != "first_norm"}


# what runs on ranks is of this module, so that importing it there registers the family
def _truth() -> Curve:
    return reference.train(CONFIG, layouts.STEPS)


@cache
def _known_truth() -> Curve:
    return run_ranks(1, _truth)[0]


def _train(layout: Layout) -> Curve:
    return layouts.train(CONFIG, layout)


def _run(recipe: dict[str, Any], ds: dict[str, Any]) -> int:
    return tiny._train(recipe, ds)


def _one_process(recipe: dict[str, Any], ds: dict[str, Any]) -> tuple[list[float], list[float]]:
    from zeropipe.trainer.testing.curves import one_process

    curve = one_process(tiny.plan_of(recipe, ds, 1))
    return curve.losses, curve.norms


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_follows_plain_hugging_face(name):
    truth = _known_truth()
    for curve in run_ranks(LAYOUTS[name].world, _train, LAYOUTS[name]):
        assert_same(curve, truth)


def test_a_run_goes_on_from_layout_to_layout_and_is_exported(tmp_path):
    store, tensor = tiny.tiny_store(tmp_path / "store"), {"tensor_parallel": {"autotp_size": 2}}
    sections = {"model": {"config": {**tiny.LLAMA, "model_type": NAME}}, "save": {"every": 2}}
    sections["schedule"] = {"type": "constant", "warmup": 0}

    def recipe(steps: int, stages: int = 1) -> dict[str, Any]:
        extent = {"duration": {"steps": steps}, "parallel": {"pipeline": stages}}
        return tiny.tiny_recipe(store, tmp_path / "run", **sections, **extent)

    for world, stages, zero, extra in ((1, 1, "zero0", {}), (2, 1, "zero2", tensor), (2, 2, "zero1", {})):
        newest = Checkpoint.find(tmp_path / "run") if (tmp_path / "run").exists() else None
        steps = 2 if newest is None else Checkpoint.open(newest).step + 2
        run_ranks(world, _run, recipe(steps, stages), tiny.tiny_json(zero, **extra))
    records = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    [(losses, norms)] = run_ranks(1, _one_process, {**recipe(6), "output": str(tmp_path / "truth")}, tiny.tiny_json())
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=1e-6)
    assert [record["grad_norm"] for record in records] == pytest.approx(norms, rel=1e-5)

    done = export(tmp_path / "run")
    assert done.step == 6 and done.deviation is not None and done.deviation <= 1e-5
    model, checkpoint = AutoModelForCausalLM.from_pretrained(done.folder), Checkpoint.open(tmp_path / "run")
    assert isinstance(model, ToyForCausalLM)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, checkpoint.read(name)), name


def test_a_norm_that_feeds_split_linears_must_be_named():
    with pytest.raises(ValueError, match=r"fed by.*self_attn\.k_proj"):
        replace(TOY, feeds=GATES)


def _forgetful() -> Family:
    """A record that says of another module that it feeds the attention, as if `first_norm` were not there."""
    return replace(TOY, feeds={**GATES, "self_attn": TOY.feeds["first_norm"]})


def _train_forgetful() -> None:
    FAMILIES._entries[NAME] = _forgetful()
    layouts.train(CONFIG, TP2)


def test_a_norm_that_is_not_accounted_for_is_refused_on_the_ranks_and_before(monkeypatch, tmp_path):
    with pytest.raises(RankFailed, match=r"model\.layers\.0\.first_norm\.weight: the record of its model family"):
        run_ranks(2, _train_forgetful)
    monkeypatch.setitem(FAMILIES._entries, NAME, _forgetful())
    store = tiny.tiny_store(tmp_path / "store")
    recipe = tiny.tiny_recipe(store, tmp_path / "run", model={"config": {**tiny.LLAMA, "model_type": NAME}})
    assert tiny.plan_of(recipe, tiny.tiny_json(), 1).parameters
    with pytest.raises(UserError, match=r"model\.layers\.0\.first_norm\.weight feeds split linears"):
        tiny.plan_of(recipe, tiny.tiny_json(tensor_parallel={"autotp_size": 2}), 2)
