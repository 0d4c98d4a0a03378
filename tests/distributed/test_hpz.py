"""ZeRO++'s hierarchical partition: a second copy of the parameters, cut over fewer ranks, changes no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from zeropipe.data_prep.errors import UserError

pytestmark = pytest.mark.distributed
STEPS = 6


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tiny.tiny_store(tmp_path_factory.mktemp("data") / "store")


def json_of(size: int, **extra: Any) -> dict[str, Any]:
    ds = tiny.tiny_json("zero3", micro=1, **extra)
    # without small parameters kept whole, every one goes through the second partition
    ds["zero_optimization"] |= {"zero_hpz_partition_size": size, "stage3_param_persistence_threshold": 0}
    return ds


def recipe_of(store: Path, output: Path, **sections: Any) -> dict[str, Any]:
    return tiny.tiny_recipe(store, output, schedule={"type": "constant", "warmup": 0}, **sections)


@pytest.mark.parametrize(
    "extra", [pytest.param({}, id="fp32", marks=pytest.mark.slow), pytest.param({"bf16": {"enabled": True}}, id="bf16")]
)
def test_losses_are_those_without_it(extra, store, tmp_path):
    found = {n: tiny.train_on_ranks(4, recipe_of(store, tmp_path / f"{n}"), json_of(n, **extra)) for n in (1, 2)}
    assert found[2]["loss"] == pytest.approx(found[1]["loss"], rel=1e-7)
    assert found[2]["grad_norm"] == pytest.approx(found[1]["grad_norm"], rel=1e-6)


def test_it_is_at_work(store, tmp_path):
    from tests.harness import run_ranks

    assert run_ranks(4, secondary, recipe_of(store, tmp_path / "run"), json_of(2)) == [[0.5]] * 4


def secondary(recipe: dict[str, Any], ds: dict[str, Any]) -> list[float]:
    """Shares of a parameter that the second copies hold between forward and backward."""
    from zeropipe.trainer.engine.build import build_engine
    from zeropipe.trainer.ranks.ranks import join_world
    from zeropipe.trainer.run.data import RunData

    ranks = join_world()
    plan = tiny.plan_of(recipe, ds, ranks.world)
    ranks = ranks.lay_out(1, 1, 1)
    engine = build_engine(plan, ranks)
    parameters, found, backward = list(engine.module.parameters()), set(), engine.deepspeed.backward

    def looking(*args: Any, **kwargs: Any) -> None:
        held: list[tuple[Any, int]] = [(p.ds_secondary_tensor, p.ds_numel) for p in parameters]  # type: ignore[attr-defined]
        found.update(tensor.numel() / numel for tensor, numel in held if tensor is not None)
        backward(*args, **kwargs)

    engine.deepspeed.backward = looking
    with RunData.open(plan).stream(ranks) as stream:
        engine.train_step(stream, 0)
    return sorted(found)


def test_resumes_bit_for_bit_and_on_another_layout(store, tmp_path):
    whole = tiny.train_on_ranks(4, recipe_of(store, tmp_path / "whole", save={"every": 3}), json_of(2))["loss"]
    at_3 = str(tmp_path / "whole" / "checkpoints" / "step-00000003")
    for name, ds, world in (("same", json_of(2), 4), ("other", json_of(1), 2)):
        found = tiny.train_on_ranks(world, recipe_of(store, tmp_path / name, resume=at_3), ds)["loss"]
        assert found == (whole[3:] if name == "same" else pytest.approx(whole[3:], rel=1e-6))


@pytest.mark.parametrize(
    ("size", "world", "changes", "said"),
    [
        (3, 4, {}, "zero_hpz_partition_size 3 does not divide the 4 ranks; sizes that do: 1, 2, 4"),
        (2, 2, {"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 2}}, "needs zero_optimization.stage 3"),
        (2, 4, {"tensor_parallel": {"autotp_size": 2}}, "zero_hpz_partition_size 2 with tensor parallel 2"),
    ],
)
def test_what_is_refused(size, world, changes, said, store, tmp_path):
    with pytest.raises(UserError, match=said):
        tiny.plan_of(recipe_of(store, tmp_path / "run"), {**json_of(size), **changes}, world)
