"""A gradient that is no number: the run stops, or goes on as if the step had never been taken, on every layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.harness import run_ranks
from tests.tiny import _train, tiny_json, tiny_recipe, tiny_store
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.checkpoint.reader import Checkpoint
from zeropipe.trainer.metrics.reading import read_metrics

pytestmark = pytest.mark.distributed

BAD, STEPS = 2, 5  # step 3 is spoilt
LAYOUTS = {
    "zero0": ("zero0", {}, {}),
    "zero1": ("zero1", {}, {}),
    "zero2-bf16": ("zero2", {"bf16": {"enabled": True}}, {}),
    "zero1-bf16-fp32-sums": ("zero1", {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, {}),
    "zero2-offload": ("zero2_offload", {}, {}),
    "zero3": ("zero3", {}, {}),
    "pipeline": ("zero1", {}, {"parallel": {"pipeline": 2}}),
    "tensor": ("zero1", {"tensor_parallel": {"autotp_size": 2}}, {}),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tiny_store(tmp_path_factory.mktemp("data") / "store")


def _train_spoilt(recipe: dict, ds: dict, spoilt: list[int], forbidden: list[int]) -> str | int:
    """Trains; the gradients of one parameter of the last rank are infinite in the steps `spoilt`.

    Steps in `forbidden` must not be computed at all.
    """
    import os

    import torch

    from zeropipe.trainer.engine.pipeline import PipelineEngine
    from zeropipe.trainer.engine.zero import ZeroEngine

    now = {"step": -1}
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    for engine_class in (ZeroEngine, PipelineEngine):

        def update(self, batch, step, weight, real=engine_class._update):
            assert step not in forbidden, "a step that is left out was computed"
            now["step"] = step
            if not getattr(self, "hooked", False) and last:
                self.hooked = True
                parameter = next(p for p in self.module.parameters() if p.requires_grad)
                parameter.register_hook(lambda g: torch.full_like(g, torch.inf) if now["step"] in spoilt else g)
            return real(self, batch, step, weight)

        engine_class._update = update  # type: ignore[method-assign]
    try:
        return _train(recipe, ds)
    except UserError as error:
        return str(error)


def _recipe(store: Path, output: Path, **sections) -> dict:
    constant = {"schedule": {"type": "constant", "warmup": 0}, "duration": {"steps": STEPS}, "save": {"every": 1}}
    return tiny_recipe(store, output, **{**constant, "save": {"every": 1, "keep": 10}, **sections})


def _weights(output: Path, step: int) -> np.ndarray:
    checkpoint = Checkpoint.open(output / "checkpoints" / f"step-{step:08d}")
    names = checkpoint.names()
    return np.concatenate([checkpoint.read(n, k).numpy().ravel() for n in names for k in checkpoint.kinds(n)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_step_is_left_out(layout, store, tmp_path):
    zero, extra, sections = LAYOUTS[layout]
    output, ds = tmp_path / "run", tiny_json(zero, **extra)
    recipe = _recipe(store, output, on_bad_step="skip", **sections)
    assert run_ranks(2, _train_spoilt, recipe, ds, [BAD], []) == [STEPS] * 2
    assert np.array_equal(_weights(output, BAD), _weights(output, BAD + 1)), "the weights moved"
    assert not np.array_equal(_weights(output, BAD + 1), _weights(output, BAD + 2))
    assert np.isfinite(_weights(output, STEPS)).all()
    state = json.loads((output / "checkpoints" / f"step-{STEPS:08d}" / "state.json").read_text())
    size = recipe["batch"]["global"]
    assert state["skipped"] == [[BAD * size, (BAD + 1) * size]]
    records = read_metrics(output)
    [skip] = [record for record in records if record.get("event") == "skip"]
    assert (skip["step"], skip["samples"]) == (BAD + 1, state["skipped"][0])
    assert [r.get("applied", True) for r in records if r["kind"] == "train"] == [n != BAD for n in range(STEPS)]


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero3"])
def test_a_restart_does_not_compute_them_again(zero, store, tmp_path):
    output, ds = tmp_path / "run", tiny_json(zero)
    recipe = _recipe(store, output, on_bad_step="skip")
    run_ranks(2, _train_spoilt, recipe, ds, [BAD], [])
    before = _weights(output, STEPS)
    again = {**recipe, "resume": str(output / "checkpoints" / "step-00000001")}
    assert run_ranks(2, _train_spoilt, again, ds, [], [BAD]) == [STEPS] * 2
    assert np.array_equal(_weights(output, STEPS), before)


def test_too_many_in_a_row_stop_the_run(store, tmp_path):
    recipe = _recipe(store, tmp_path / "run", on_bad_step="skip", duration={"steps": 9})
    for said in run_ranks(2, _train_spoilt, recipe, tiny_json("zero1"), list(range(1, 9)), []):
        assert "step 6: the gradient norm is inf" in said and "in 5 steps in a row" in said


@pytest.mark.parametrize("zero", ["zero0", "zero1"])
def test_by_default_it_stops(zero, store, tmp_path):
    recipe = _recipe(store, tmp_path / "run")
    for said in run_ranks(2, _train_spoilt, recipe, tiny_json(zero), [BAD], []):
        assert "step 3: the gradient norm is inf" in said and "on_bad_step=skip" in said
