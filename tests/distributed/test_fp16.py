"""fp16 on a CPU, which computes in it if it is said to: why ZeRO-0 is refused, and what is recorded of the scale."""

from __future__ import annotations

import math

import pytest

from tests.distributed import layouts, reference
from tests.distributed.reference import gpt2
from tests.harness import run_ranks
from tests.tiny import _train, tiny_json, tiny_recipe, tiny_store
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.checkpoint.reader import Checkpoint
from zeropipe.trainer.metrics.reading import read_metrics
from zeropipe.trainer.plan.layout import Layout
from zeropipe.trainer.plan.legality import check
from zeropipe.trainer.plan.settings import read_settings

pytestmark = pytest.mark.distributed


def _let_fp16_be() -> None:
    from zeropipe.trainer.ranks.ranks import accelerator

    type(accelerator()).is_fp16_supported = lambda self: True


def _norms(stage: int) -> list[float]:
    _let_fp16_be()
    fp16 = {"enabled": True, "loss_scale": 1024}
    return layouts.train(gpt2(), Layout(world=1, data=1, zero_stage=stage), fp16=fp16).norms


def test_zero_0_takes_other_steps_and_is_refused():
    """DeepSpeed scales no loss there and divides by the scale all the same: the first gradient is right, its update is
    not. Measured: ZeRO-1 within 6e-4 of fp32, ZeRO-0 4 % off from the second step on.
    """
    truth = reference.truth(gpt2(), layouts.STEPS).norms
    zero0, zero1 = (run_ranks(1, _norms, stage)[0] for stage in (0, 1))
    assert zero1 == pytest.approx(truth, rel=2e-3)
    assert abs(zero0[1] / truth[1] - 1) > 2e-2, "right by now: `plan` need not refuse it"
    recipe = layouts.recipe_for(gpt2())
    settings = read_settings({"fp16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1})
    with pytest.raises(UserError, match=r"fp16 with ZeRO-0: .*divides the gradients"):
        check(recipe, settings, Layout(world=1, data=1), gpt2())


def test_steps_without_an_update_and_the_loss_scale_are_in_the_record(tmp_path):
    recipe = tiny_recipe(tiny_store(tmp_path / "store"), tmp_path / "run")
    fp16 = {"enabled": True, "initial_scale_power": 19, "hysteresis": 1}
    run_ranks(2, _train_in_fp16, recipe, tiny_json("zero1", fp16=fp16))
    steps = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    scale, applied = 2.0**19, [record.get("applied", True) for record in steps]
    assert applied == sorted(applied) and len(set(applied)) == 2, "it is to look for its scale, and to find it"
    for record, done in zip(steps, applied, strict=True):
        scale = scale if done else scale / 2
        assert record["loss_scale"] == scale and math.isfinite(record["grad_norm"]) == done
    assert Checkpoint.open(tmp_path / "run").state["engine"]["loss_scaler"]["cur_scale"] == scale


def _train_in_fp16(recipe: dict, ds: dict) -> int:
    _let_fp16_be()
    return _train(recipe, ds)
