"""Train three steps on one layout, go on on another: all ordered pairs of a dozen layouts, through live engines."""

from __future__ import annotations

import hashlib
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.harness import run_ranks
from zeropipe.trainer.checkpoint.reader import Checkpoint
from zeropipe.trainer.export.huggingface import export

pytestmark = pytest.mark.distributed
TENSOR = {"tensor_parallel": {"autotp_size": 2}}
# name: ranks, pipeline stages, JSON, ZeRO
LAYOUTS: dict[str, tuple[int, int, dict[str, Any], str]] = {
    "dp1-z0": (1, 1, {}, "zero0"),
    "dp2-z0": (2, 1, {}, "zero0"),
    "dp2-z1": (2, 1, {}, "zero1"),
    "dp2-z2": (2, 1, {}, "zero2"),
    "dp2-z3": (2, 1, {}, "zero3"),
    "dp4-z1": (4, 1, {}, "zero1"),
    "dp4-z3": (4, 1, {}, "zero3"),
    "tp2-z1": (2, 1, TENSOR, "zero1"),
    "tp2-dp2-z3": (4, 1, TENSOR, "zero3"),
    "pp2-z1": (2, 2, {}, "zero1"),
    "pp2-dp2-z1": (4, 2, {}, "zero1"),
    "pp2-tp2-z1": (4, 2, TENSOR, "zero1"),
}
IN_TEST = [
    ("dp1-z0", "pp2-tp2-z1"),
    ("pp2-tp2-z1", "dp4-z3"),
    ("tp2-dp2-z3", "pp2-z1"),
    ("pp2-dp2-z1", "dp2-z0"),
    ("dp2-z3", "tp2-z1"),
]
PAIRS = [
    pytest.param(*pair, marks=() if pair in IN_TEST else pytest.mark.slow, id=" to ".join(pair))
    for pair in permutations(LAYOUTS, 2)
]


class Runs:
    """Runs of three steps by layout, made when they are asked for, and the losses of one that was never reshaped."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, tiny.tiny_store(folder / "store")
        self.made: dict[str, Path] = {}
        self.steady = tiny.train_on_ranks(1, self.recipe("steady", 5), tiny.tiny_json("zero0"))["loss"]

    def recipe(self, name: str, steps: int, stages: int = 1) -> dict[str, Any]:
        sections = {"duration": {"steps": steps}, "schedule": {"type": "constant", "warmup": 0}}
        return tiny.tiny_recipe(self.store, self.folder / name, parallel={"pipeline": stages}, **sections)

    def of(self, layout: str) -> Path:
        """The run directory of three steps on a layout."""
        if layout not in self.made:
            ranks, stages, extra, zero = LAYOUTS[layout]
            recipe = self.recipe(layout, 3, stages)
            tiny.train_on_ranks(ranks, recipe, tiny.tiny_json(zero, 2, **extra))
            self.made[layout] = Path(recipe["output"])
        return self.made[layout]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("reshape"))


def _go_on(recipe: dict[str, Any], ds: dict[str, Any], source: str) -> list[float]:
    """Loads, saves at once what was loaded, and trains two more steps; their losses."""
    from zeropipe.trainer.checkpoint.loader import load
    from zeropipe.trainer.engine.build import build_engine
    from zeropipe.trainer.engine.checkpoints import Checkpoints
    from zeropipe.trainer.metrics.record import RunLog
    from zeropipe.trainer.ranks.ranks import join_world
    from zeropipe.trainer.run.data import RunData
    from zeropipe.trainer.run.guard import StopRequest
    from zeropipe.trainer.run.state import TrainState

    ranks = join_world()
    plan = tiny.plan_of(recipe, ds, ranks.world)
    layout = plan.layout
    ranks = ranks.lay_out(layout.tensor, layout.sequence, layout.pipeline, layout.expert)
    engine = build_engine(plan, ranks)
    saved = load(engine.live, Checkpoint.find(source))
    state = TrainState(plan.total_steps, saved["step"], saved["samples_consumed"], saved["tokens_consumed"])
    data = RunData.open(plan)
    stream = data.stream(ranks)
    checkpoints = Checkpoints(engine, data, stream, RunLog(plan, ranks, StopRequest(ranks)))
    checkpoints.save(state)
    checkpoints.writer.wait()
    stream.samples_consumed = state.samples_consumed
    losses = [engine.train_step(stream, step).loss for step in (state.step, state.step + 1)]
    stream.close()
    return losses


def _exported(run: Path) -> str:
    export(run, run / "export")
    return hashlib.sha256((run / "export" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_reshape(before, after, runs, tmp_path, record_property):
    """Weights, moments and exports are bitwise the same across the change; the next losses are the steady run's."""
    source = runs.of(before)
    ranks, stages, extra, zero = LAYOUTS[after]
    recipe = {**runs.recipe("unused", 5, stages), "output": str(tmp_path / "resaved")}
    losses = run_ranks(ranks, _go_on, recipe, tiny.tiny_json(zero, 2, **extra), str(source))
    one, other = Checkpoint.open(source), Checkpoint.open(tmp_path / "resaved")
    assert one.names() == other.names()
    for name in one.names():
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            assert one.read(name, kind).numpy().tobytes() == other.read(name, kind).numpy().tobytes(), (name, kind)
    error = max(abs(a - b) / b for a, b in zip(losses[0], runs.steady[3:], strict=True))
    record_property("worst relative loss error", error)
    assert error < 1e-6
    (tmp_path / "resaved" / "recipe.yaml").write_text((source / "recipe.yaml").read_text())
    if not (source / "export").exists():
        _exported(source)
    whole = hashlib.sha256((source / "export" / "model.safetensors").read_bytes()).hexdigest()
    assert _exported(tmp_path / "resaved") == whole
