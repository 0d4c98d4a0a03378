"""Building on ranks: under ZeRO-3 no rank ever holds the model."""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path

import pytest
import torch

from tests.harness import run_ranks
from tests.tiny import GPT2, NO_DROPOUT, plan_of, tiny_json, tiny_recipe, tiny_store, train_on_ranks
from zeropipe.trainer.families.specs import parameter_table
from zeropipe.trainer.metrics.reading import read_metrics
from zeropipe.trainer.modeling.build import build_model
from zeropipe.trainer.modeling.values import RandomValues
from zeropipe.trainer.ranks.ranks import init_distributed

pytestmark = pytest.mark.distributed
GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_gpt2.json"
CONFIG = {**GPT2, "n_embd": 128, "n_layer": 6, "vocab_size": 2000, "bos_token_id": 0, "eos_token_id": 0}


def _live_bytes() -> int:
    """Of all tensors made since `gc.freeze`, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Counted:
    """A parameter that counts what is read of it."""

    def __init__(self, value: torch.Tensor, read: list[int]) -> None:
        self.value, self.read, self.shape = value, read, value.shape

    def __getitem__(self, index):
        self.read.append(self.value[index].numel())
        return self.value[index]


def _values_made(stage: int, stored: bool, hpz: int) -> tuple[int, bool]:
    """How many values this rank reads or draws for its model, and whether it comes to the right ones."""
    import deepspeed

    ranks = init_distributed()
    ds = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "zero_hpz_partition_size": hpz},
    }
    made: list[int] = []
    random, draw = RandomValues(1), RandomValues.__call__

    def drawing(self, spec):
        made.append(math.prod(spec.shape))
        return draw(self, spec)

    RandomValues.__call__ = drawing
    values = (lambda spec: Counted(draw(random, spec), made)) if stored else None
    model = build_model(CONFIG, values, 1, torch.float32, ranks, ds if stage == 3 else None)
    RandomValues.__call__ = draw
    engine = deepspeed.initialize(model=model, config=ds, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))[0]
    right = True
    for parameter in engine.module.parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            spec = parameter.spec
            right &= torch.equal(parameter[: spec.shape[0]], random(spec)) and not parameter[spec.shape[0] :].any()
    return sum(made), right


@pytest.mark.parametrize("hpz", [1, 2])
@pytest.mark.parametrize("stored", [False, True], ids=["drawn", "stored"])
def test_zero3_ranks_share_the_initial_values(stored, hpz):
    """Every value is read once by the rank that keeps it (twice for a second copy), or drawn once by any."""
    whole = sum(math.prod(spec.shape) for spec in parameter_table(CONFIG))
    found = run_ranks(4, _values_made, 3, stored, hpz)
    assert all(right for _, right in found)
    if stored and hpz == 2:  # a quarter, and a half, which overlap in half of the ranks
        assert all(made < 0.8 * whole for made, _ in found)
    else:
        assert sum(made for made, _ in found) == whole
        assert max(made for made, _ in found) < 0.5 * whole  # the embedding is a third


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_of_whole_replicas_the_first_makes_the_initial_values(stage):
    whole = sum(math.prod(spec.shape) for spec in parameter_table(CONFIG))
    for stored in (False, True):
        assert run_ranks(2, _values_made, stage, stored, 1) == [(whole, True), (0, True)]


def _build_zero3() -> tuple[int, int, bool]:
    ranks = init_distributed()
    ds = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    gc.collect()
    gc.freeze()  # what is there already is not looked at again and again
    peak = 0
    random = RandomValues(1)

    def values(spec):
        nonlocal peak
        value = random(spec)
        peak = max(peak, _live_bytes())
        return value

    model = build_model(CONFIG, values, 1, torch.float32, ranks, ds)
    right = True
    for parameter in model.parameters():
        shard, spec = parameter.ds_tensor, parameter.spec  # type: ignore[attr-defined]
        full = torch.zeros(spec.padded_shape)
        full[: spec.shape[0]] = random(spec)
        start = ranks.rank * shard.ds_numel
        own = full.flatten()[start : start + shard.ds_numel]
        right &= torch.equal(shard[: len(own)], own) and parameter.numel() == 0
    return peak, sum(p.ds_tensor.numel() * 4 for p in model.parameters()), right  # type: ignore[attr-defined]


def test_zero3_holds_its_share_and_one_parameter():
    specs = parameter_table(CONFIG)
    whole, largest = sum(4 * spec.numel for spec in specs), max(4 * spec.numel for spec in specs)
    for peak, share, right in run_ranks(2, _build_zero3):
        assert right
        assert share < 0.51 * whole
        # while a value is made: the share so far, the value, and its predecessor before the collector comes
        assert peak < share + 2.5 * largest < whole


def test_golden_losses(tmp_path):
    """A change of order, initial values, schedule or loss shows here. To accept one, delete the file and rerun."""
    store = tiny_store(tmp_path / "store")
    recipe = tiny_recipe(store, tmp_path / "run", model={"config": {**GPT2, **NO_DROPOUT}}, duration={"steps": 10})
    losses = train_on_ranks(1, recipe, tiny_json("zero1"))["loss"]
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")
        pytest.fail(f"wrote {GOLDEN}; look at it and commit it")
    assert losses == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-6)


def _draws_of(recipe: dict, ds: dict) -> tuple[int, list[float]]:
    """How many values this rank draws to train, and the last steps' losses."""
    from zeropipe.trainer.loop import train
    from zeropipe.trainer.ranks.ranks import join_world

    ranks = join_world()
    made: list[int] = []
    draw = RandomValues.__call__

    def drawing(self, spec):
        made.append(math.prod(spec.shape))
        return draw(self, spec)

    RandomValues.__call__ = drawing
    train(plan_of(recipe, ds, ranks.world), ranks.lay_out(1, 1, 1))
    return sum(made), [record["loss"] for record in read_metrics(recipe["output"]) if record["kind"] == "train"]


@pytest.mark.parametrize("zero", ["zero1", "zero3"])
def test_a_run_that_resumes_draws_nothing(zero, tmp_path):
    store = tiny_store(tmp_path / "store")
    recipes = {
        steps: tiny_recipe(store, tmp_path / "run", duration={"steps": steps}, save={"every": 2}) for steps in (2, 4)
    }
    for recipe in recipes.values():
        recipe["schedule"] = {"type": "constant", "warmup": 0}
    assert sum(made for made, _ in run_ranks(2, _draws_of, recipes[2], tiny_json(zero))) > 0
    resumed = run_ranks(2, _draws_of, recipes[4], tiny_json(zero))
    assert [made for made, _ in resumed] == [0, 0]
    whole = tiny_recipe(store, tmp_path / "whole", duration={"steps": 4}, schedule={"type": "constant", "warmup": 0})
    assert resumed[0][1] == train_on_ranks(2, whole, tiny_json(zero))["loss"]
