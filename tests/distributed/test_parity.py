"""The parity gate: green on right layouts, and red, naming step and quantity, on every planted defect."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace

import pytest
import torch

from tests import tiny
from zeropipe.launcher.cli import main
from zeropipe.trainer.plan.layout import Layout
from zeropipe.trainer.recipe.recipe import Recipe, dump_recipe
from zeropipe.trainer.testing.curves import one_process
from zeropipe.trainer.testing.local_ranks import on_local_ranks
from zeropipe.trainer.testing.parity import Bounds, parity, plan_in, plans_of, verdict

pytestmark = pytest.mark.distributed

STEPS = 4
DP2 = Layout(world=2, data=2, zero_stage=2)
TP2 = Layout(world=2, data=1, tensor=2, zero_stage=1)
PP2 = Layout(world=2, data=1, pipeline=2, zero_stage=1)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    store = tiny.tiny_store(folder / "store")
    # documents end inside of samples, and end tokens carry no loss: ranks hold unlike numbers of tokens
    values = tiny.tiny_recipe(
        store,
        folder / "run",
        data={"document_mask": True},
        schedule={"type": "constant", "warmup": 0},
        optimizer={"lr": 1e-2},
    )
    return Recipe.model_validate(values)


@pytest.fixture(scope="module")
def truth(recipe):
    plan = plan_in(recipe, tiny.tiny_json(), Layout(world=1, data=1), STEPS)
    [curve] = on_local_ranks(1, one_process, plan)
    assert min(curve.norms) > 0.45, "clipping at 0.3 must be at work"
    return curve


def _verdict(recipe, truth, layout, sabotage=None):
    return verdict(plan_in(recipe, tiny.tiny_json(), layout, STEPS), truth, Bounds(), sabotage)


@pytest.mark.parametrize("layout", [DP2, TP2, PP2], ids=str)
def test_right_layouts_are_the_same(recipe, truth, layout):
    found = _verdict(recipe, truth, layout)
    assert found.difference is None
    assert found.loss < 1e-6 and found.norm < 1e-5 and found.weights < 1e-4


def _tied_gradient_not_summed():
    from deepspeed.runtime.pipe.engine import PipelineEngine

    # the instruction map of the schedule holds the function itself
    for instruction, function in list(PipelineEngine._INSTRUCTION_MAP.items()):
        if function is PipelineEngine._exec_reduce_tied_grads:
            PipelineEngine._INSTRUCTION_MAP[instruction] = lambda self: None


def _mean_of_means():
    from zeropipe.trainer.engine.coming import Agreed

    take = Agreed.take

    def of_this_rank(self, stream, ranks):
        batch, totals = take(self, stream, ranks)
        return batch, replace(totals, weight=batch.tokens * ranks.data_size)

    Agreed.take = of_this_rank


def _wrong_ranks_data():
    from zeropipe.trainer.data.batches import BatchShape

    BatchShape.rows = lambda self, ranks, micro: range(micro * ranks.data_size, micro * ranks.data_size + 2)


def _labels_off_by_one():
    from zeropipe.trainer.modeling.causal import CausalLM

    forward = CausalLM.forward
    CausalLM.forward = lambda self, ids, labels, positions=None: forward(self, ids, labels.roll(-1, 1), positions)


def _norm_counted_twice():
    from zeropipe.trainer.modeling import tensor_parallel

    tensor_parallel.mark = lambda parameter, ranks: setattr(parameter, "model_parallel", True)


def _same_dropout_masks():
    from zeropipe.trainer.modeling.split_randomness import SplitRandomness

    SplitRandomness.enter = lambda self: None


def _unscaled_clipping():
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    clip = DeepSpeedZeroOptimizer.unscale_and_clip_grads
    DeepSpeedZeroOptimizer.unscale_and_clip_grads = lambda self, grads, norm: clip(self, grads, torch.zeros_like(norm))


DEFECTS = {
    _tied_gradient_not_summed: (PP2, r"step 1: gradient norm"),
    _mean_of_means: (DP2, r"step 1: loss"),
    _wrong_ranks_data: (DP2, r"step 1: loss"),
    _labels_off_by_one: (DP2, r"step 1: loss"),
    _norm_counted_twice: (TP2, r"step 1: gradient norm"),
    _same_dropout_masks: (TP2, r"step 1: tensor ranks drop the same"),
    _unscaled_clipping: (DP2, r"step \d: (loss|gradient norm)"),
}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__.strip("_"))
def test_planted_defects_turn_the_gate_red(recipe, truth, defect):
    layout, expected = DEFECTS[defect]
    found = _verdict(recipe, truth, layout, defect)
    assert re.match(expected, str(found.difference)), found.difference


def _dies():
    raise RuntimeError("planted")


def test_a_layout_that_fails_is_red_and_says_why(recipe, truth):
    assert "planted" in _verdict(recipe, truth, DP2, _dies).difference


def test_every_kind_of_layout_is_tried(recipe):
    layouts = [plan.layout for plan in plans_of(recipe, tiny.tiny_json(), 4, STEPS)]
    assert len(layouts) == len(set(layouts)) and layouts[0].world == 1
    for axis, stage in itertools.product(("data", "tensor"), range(4)):
        assert any(getattr(layout, axis) == 4 and layout.zero_stage == stage for layout in layouts)
    assert any(layout.pipeline == layout.tensor == 2 for layout in layouts)
    assert any(layout.pipeline == layout.data == 2 for layout in layouts)
    assert any(layout.sequence == layout.data == 2 for layout in layouts)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", [{**tiny.GPT2, **tiny.NO_DROPOUT}, tiny.LLAMA], ids=["gpt2", "llama"])
def test_every_legal_layout_of_1_2_and_4_ranks(recipe, model, record_property):
    """Twenty steps each: minutes.

    At the learning rate of a real run. At the 1e-2 that shows planted defects within four steps, training itself makes
    1.2e-6 of the rounding in the loss, and 3e-5 in the norm, by the twentieth, data parallel or not.
    """
    update = {
        "model": recipe.model.model_copy(update={"config": model}),
        "optimizer": recipe.optimizer.model_copy(update={"lr": 1e-3}),
    }
    verdicts = list(parity(recipe.model_copy(update=update), tiny.tiny_json(), ranks=4, steps=20))
    record_property("layouts", len(verdicts))
    for quantity in ("loss", "norm", "weights"):
        record_property(f"worst {quantity}", max(getattr(found, quantity) for found in verdicts))
    assert len(verdicts) >= 46
    assert not [str(found) for found in verdicts if found.difference]


def test_the_command_prints_a_line_for_each_layout(recipe, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    (tmp_path / "ds.json").write_text(json.dumps(tiny.tiny_json()))
    files = str(tmp_path / "recipe.yaml"), "--deepspeed_config", str(tmp_path / "ds.json")
    assert main(["parity", *files, "--ranks", "1", "--steps", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("layout")
    assert [line.split("  ")[0] for line in lines[1:-1]] == [f"data 1, ZeRO-{stage}" for stage in range(4)]
    assert lines[-1] == "4 layouts, 2 steps each: all the same"
    assert not recipe.output.exists(), "the gate writes no run directory"
