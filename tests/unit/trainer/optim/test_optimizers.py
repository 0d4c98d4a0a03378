"""Optimizers as records: what plans, engines and memory ask of them, and one from outside."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import plan_of, tiny_json, tiny_recipe, tiny_store
from tests.toys.optimizer import MOMENTUM
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.families.specs import ParamSpec
from zeropipe.trainer.optim.adamw import ADAMW
from zeropipe.trainer.optim.groups import parameter_groups
from zeropipe.trainer.optim.registry import OPTIMIZERS, optimizer_of


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.mktemp("optim") / "store", documents=60)


def test_spellings():
    assert optimizer_of("adamw") is optimizer_of("Adam") is OPTIMIZERS["adamw"] is ADAMW
    assert optimizer_of("Lion") is None and optimizer_of(3) is None
    assert optimizer_of("toymomentum") is MOMENTUM


def test_the_states_are_those_that_torch_keeps():
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    adamw = torch.optim.AdamW([weight])
    toy = MOMENTUM.build([{"params": [weight]}], {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0})  # type: ignore[misc]
    for optimizer, record in ((adamw, ADAMW), (toy, MOMENTUM)):
        optimizer.step()
        tensors = {name: value for name, value in optimizer.state[weight].items() if value.shape == weight.shape}
        assert tuple(tensors) == record.states
        assert sum(value.nbytes for value in tensors.values()) == record.state_bytes(record.groups[0]) * weight.numel()


def test_a_cpu_takes_torchs_adam_unless_told_otherwise():
    assert ADAMW.params_on("cpu", {"lr": 1}) == {"lr": 1, "torch_adam": True, "fused": True}
    assert ADAMW.params_on("cpu", {"foreach": True}) == {"foreach": True, "torch_adam": True}
    assert ADAMW.params_on("cpu", {"torch_adam": False}) == {"torch_adam": False}
    assert ADAMW.params_on("cuda", {"lr": 1}) == {"lr": 1}


def test_norms_and_biases_do_not_decay():
    module = torch.nn.ParameterList(torch.nn.Parameter(torch.ones(2)) for _ in range(4))
    for parameter, decays in zip(module, (False, True, True, False), strict=True):
        parameter.spec = ParamSpec("x", (2, 1) if decays else (2,))  # type: ignore[attr-defined]
    module[2].requires_grad_(False)
    matrices, rest = parameter_groups(module, ADAMW)
    assert matrices == {"params": [module[1]]}
    assert rest == {"params": [module[0], module[3]], "weight_decay": 0.0}
    module[1].requires_grad_(False)
    assert parameter_groups(module, ADAMW) == [rest]


def momentum(**optimizer: Any) -> dict[str, Any]:
    return tiny_json("zero1", optimizer={"type": "ToyMomentum", "params": {"momentum": 0.9, **optimizer}})


def test_an_optimizer_from_outside_is_planned(store: Path, tmp_path: Path):
    recipe = tiny_recipe(store, tmp_path / "run")
    plan = plan_of(recipe, momentum(), 2)
    params = {"momentum": 0.9, "lr": 1e-3, "weight_decay": 0.1}
    assert plan.deepspeed["optimizer"] == {"type": "ToyMomentum", "params": params}
    assert plan.deepspeed["zero_allow_untested_optimizer"] is True
    assert plan.settings.optimizer is MOMENTUM
    assert pickle.loads(pickle.dumps(plan)) == plan  # it is sent to ranks
    adam = plan_of(recipe, tiny_json("zero1"), 2)
    assert "zero_allow_untested_optimizer" not in adam.deepspeed
    assert plan.memory is not None and adam.memory is not None
    assert plan.memory.optimizer * 12 == adam.memory.optimizer * 8  # master weight and one moment, or two


def test_the_resolved_pair_of_such_a_run_plans_to_itself(store: Path, tmp_path: Path):
    from zeropipe.trainer.plan.plan import make_plan
    from zeropipe.trainer.recipe.recipe import dump_recipe, load_recipe

    first = plan_of(tiny_recipe(store, tmp_path / "run"), momentum(), 2)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(first.recipe))
    assert make_plan(load_recipe(str(tmp_path / "recipe.yaml")), first.deepspeed, 2) == first


@pytest.mark.parametrize(
    ("recipe", "ds", "message"),
    [
        ({"betas": [0.9, 0.95]}, momentum(), "optimizer.betas: ToyMomentum takes none; leave it out"),
        ({}, momentum(betas=[0.9, 0.95]), "optimizer.params.betas: unknown key"),
        ({}, tiny_json(optimizer={"type": "AdamW", "params": {"momentum": 0.9}}), "optimizer.params.momentum: unknown"),
        (
            {},
            tiny_json(optimizer={"type": "ToyMomentun"}),
            "optimizer.type 'ToyMomentun': use AdamW or Adam or Muon or",
        ),
    ],
)
def test_what_an_optimizer_does_not_take(store: Path, tmp_path: Path, recipe: dict, ds: dict, message: str):
    with pytest.raises(UserError) as caught:
        plan_of(tiny_recipe(store, tmp_path / "run", optimizer=recipe), ds, 1)
    assert message in str(caught.value) and "\n" not in str(caught.value)
