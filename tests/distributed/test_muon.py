"""Muon on whole matrices, AdamW on the rest: against plain torch in one process, across layouts and resumes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tests.distributed.muon_reference import Both, PlainMuon, hidden
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.checkpoint.reader import Checkpoint
from zeropipe.trainer.export.universal import write_universal
from zeropipe.trainer.testing.curves import plain_model, whole_batch
from zeropipe.trainer.testing.plain import Curve, train_plainly

pytestmark = pytest.mark.distributed

STEPS = 20
STAGES = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
MODELS = {"gpt2": {**tiny.GPT2, **tiny.NO_DROPOUT}, "llama": {**tiny.LLAMA, "tie_word_embeddings": False}}
OPTIMIZER: dict[str, Any] = {"lr": 1e-3, "muon_lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}


def recipe_of(store: Path, output: Path, model: str = "gpt2", **sections: Any) -> dict[str, Any]:
    own = {"model": {"config": MODELS[model]}, "optimizer": OPTIMIZER, "duration": {"steps": STEPS}}
    return tiny.tiny_recipe(store, output, **{**own, **sections})


def json_of(zero: str, **extra: Any) -> dict[str, Any]:
    ds = tiny.tiny_json(zero, optimizer={"type": "Muon"})
    del ds["gradient_clipping"]
    return {**ds, **extra}


def plain(recipe: dict[str, Any], muon: type[torch.optim.Optimizer] = PlainMuon) -> Curve:
    from zeropipe.trainer.engine.base import planned_rate
    from zeropipe.trainer.ranks.ranks import Ranks
    from zeropipe.trainer.run.data import RunData

    plan = tiny.plan_of(recipe, json_of("zero1", train_micro_batch_size_per_gpu=8), 1)
    model = plain_model(plan)
    named = list(model.named_parameters())
    matrices = [p for name, p in named if hidden(name, p)]
    others = [p for name, p in named if not hidden(name, p)]
    assert len(matrices) == {"gpt2": 8, "llama": 14}[plan.model_config["model_type"]]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": OPTIMIZER["weight_decay"]},
        {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0},
    ]
    keys = {"momentum": OPTIMIZER["momentum"], "weight_decay": OPTIMIZER["weight_decay"]}
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    both: Any = Both(muon(matrices, lr=OPTIMIZER["muon_lr"], **keys), adamw)

    def set_rate(step: int) -> None:
        for group in both.param_groups:
            group["lr"] = planned_rate(plan, step)
        both.param_groups[0]["lr"] *= OPTIMIZER["muon_lr"] / OPTIMIZER["lr"]

    with RunData.open(plan).stream(Ranks()) as stream:
        batches = (whole_batch(stream.next_step(), torch.device("cpu")) for _ in range(plan.total_steps))
        return train_plainly(model, batches, both, 0.0, set_rate)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tiny.tiny_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module")
def truths(store, tmp_path_factory):
    return cache(lambda model: plain(recipe_of(store, tmp_path_factory.mktemp("plain"), model)))


def worst(curve: Curve, run: Path) -> float:
    """The largest difference of a matrix of weights from the truth, of its norm."""
    checkpoint = Checkpoint.open(run)
    assert set(checkpoint.names()) == set(curve.weights)
    return max(
        float(np.linalg.norm(checkpoint.read(name).numpy() - weight) / np.linalg.norm(weight))
        for name, weight in curve.weights.items()
        if weight.ndim > 1
    )


FAST = [  # plain and partitioned, every model; the rest in `make verify`
    (1, "zero1", "gpt2"),
    (2, "zero2", "gpt2"),
    (2, "zero3", "llama"),
    (2, "zero3_offload", "gpt2"),
]
CASES = [
    pytest.param(world, zero, model, marks=() if (world, zero, model) in FAST else pytest.mark.slow)
    for world in (1, 2)
    for zero in STAGES
    for model in MODELS
    if world == 2 or model == "gpt2"
]


@pytest.mark.parametrize(("world", "zero", "model"), CASES)
def test_it_trains_as_plain_torch_does(world, zero, model, store, tmp_path, truths):
    """Where the iteration runs in fp32, as on a CPU, rounding alone is left."""
    recipe, truth = recipe_of(store, tmp_path / "run", model), truths(model)
    found = tiny.train_on_ranks(world, recipe, json_of(zero))
    assert found["loss"] == pytest.approx(truth.losses, rel=1e-6)
    assert worst(truth, tmp_path / "run") < 1e-4
    assert found["grad_norm"] == [None] * STEPS


@pytest.mark.parametrize(
    ("world", "zero", "precision"),
    [
        pytest.param(world, zero, precision, marks=() if precision == fast else pytest.mark.slow)
        for world, zero, fast in ((1, "zero1", "bf16"), (2, "zero2", "torch_autocast"), (2, "zero3", "bf16"))
        for precision in ("bf16", "torch_autocast")
    ],
)
def test_bf16_stays_near(world, zero, precision, store, tmp_path, truths):
    """bf16 stages keep the momentum in the gradients' precision: measured 5e-5 of the loss, 3.4e-2 of the weights."""
    truth, recipe = truths("gpt2"), recipe_of(store, tmp_path / "run")
    found = tiny.train_on_ranks(world, recipe, json_of(zero, **{precision: {"enabled": True}}))
    assert found["loss"] == pytest.approx(truth.losses, rel=3e-4)
    assert worst(truth, tmp_path / "run") < 5e-2


def test_on_a_sequence_group(store, tmp_path, truths):
    truth, recipe = truths("gpt2"), recipe_of(store, tmp_path / "run")
    found = tiny.train_on_ranks(2, recipe, json_of("zero2", sequence_parallel_size=2))
    assert found["loss"] == pytest.approx(truth.losses, rel=1e-6)
    assert worst(truth, tmp_path / "run") < 1e-4


def test_torchs_own_muon_is_as_near_as_bf16_allows(store, tmp_path, truths):
    """torch.optim.Muon always iterates in bf16. After 20 steps that alone moves the loss by 2e-5 and weights by 1.5e-2;
    DeepSpeed's `standard` method iterates in bf16 too, and rounds elsewhere."""
    truth = plain(recipe_of(store, tmp_path / "plain"), torch.optim.Muon)
    assert truth.losses == pytest.approx(truths("gpt2").losses, rel=1e-4)
    for method in ("gram", "standard"):
        ds = {**json_of("zero2"), "optimizer": {"type": "Muon", "params": {"ns_method": method}}}
        found = tiny.train_on_ranks(2, recipe_of(store, tmp_path / method), ds)
        assert found["loss"] == pytest.approx(truth.losses, rel=1e-4)
        assert worst(truth, tmp_path / method) < 5e-2


RESUMES = [pytest.param(z, {}, marks=() if z == "zero3" else pytest.mark.slow) for z in STAGES]
RESUMES += [
    pytest.param(z, {"bf16": {"enabled": True}}, marks=() if z == "zero2" else pytest.mark.slow)
    for z in STAGES
    if z != "zero2_offload"
]


@pytest.mark.parametrize(("zero", "extra"), RESUMES)
def test_a_resume_on_the_same_layout_is_the_same_bit_for_bit(zero, extra, store, tmp_path):
    sections: dict[str, Any] = {"schedule": {"type": "constant", "warmup": 0}, "duration": {"steps": 6}}
    whole = tiny.train_on_ranks(2, recipe_of(store, tmp_path / "whole", **sections), json_of(zero, **extra))
    recipe = recipe_of(store, tmp_path / "run", **sections)
    tiny.train_on_ranks(2, {**recipe, "duration": {"steps": 3}}, json_of(zero, **extra))
    assert tiny.train_on_ranks(2, recipe, json_of(zero, **extra))["loss"] == whole["loss"]
    kinds = {True: ["master", "momentum_buffer"], False: ["exp_avg", "exp_avg_sq", "master"]}
    checkpoint = Checkpoint.open(tmp_path / "run")
    for name in checkpoint.names():
        matrix = ".h." in name and len(checkpoint.shape(name)) == 2
        assert checkpoint.kinds(name) == kinds[matrix], name
    one, other = Checkpoint.open(tmp_path / "whole"), checkpoint
    assert all(torch.equal(one.read(n, k), other.read(n, k)) for n in one.names() for k in one.kinds(n))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((1, "zero1"), (4, "zero2"), marks=pytest.mark.slow),
        ((4, "zero2"), (2, "zero3")),
        pytest.param((2, "zero3"), (4, "zero1"), marks=pytest.mark.slow),
        pytest.param((4, "zero1"), (1, "zero2_offload"), marks=pytest.mark.slow),
    ],
)
def test_it_resumes_on_another_layout(before, after, store, tmp_path):
    sections: dict[str, Any] = {"schedule": {"type": "constant", "warmup": 0}, "duration": {"steps": 6}}
    whole = tiny.train_on_ranks(1, recipe_of(store, tmp_path / "whole", **sections), json_of("zero1"))
    recipe = recipe_of(store, tmp_path / "run", **sections)
    tiny.train_on_ranks(before[0], {**recipe, "duration": {"steps": 3}}, json_of(before[1]))
    assert tiny.train_on_ranks(after[0], recipe, json_of(after[1]))["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_what_deepspeed_could_not_read_is_not_exported(store, tmp_path):
    tiny.train_on_ranks(1, recipe_of(store, tmp_path / "run", duration={"steps": 2}), json_of("zero1"))
    with pytest.raises(UserError, match=r"holds Muon's momentum_buffer.*zeropipe export"):
        write_universal(tmp_path / "run", tmp_path / "universal")


def test_states_of_another_optimizer_are_refused(store, tmp_path):
    sections: dict[str, Any] = {"duration": {"steps": 2}, "optimizer": {"lr": 1e-3, "weight_decay": 0.1}}
    tiny.train_on_ranks(1, recipe_of(store, tmp_path / "run", **sections), tiny.tiny_json("zero1"))
    with pytest.raises(Exception, match="holds no momentum_buffer of transformer"):
        tiny.train_on_ranks(1, recipe_of(store, tmp_path / "run", duration={"steps": 4}), json_of("zero1"))


@pytest.mark.parametrize(
    ("world", "zero", "extra", "sections", "said"),
    [
        (1, "zero1", {"gradient_clipping": 1.0}, {}, "gradient_clipping 1.0 with Muon: .* set it to 0 or leave it out"),
        (1, "zero0", {}, {}, "Muon with ZeRO-0: use zero_optimization.stage 1, 2 or 3"),
        (2, "zero1", {"tensor_parallel": {"autotp_size": 2}}, {}, "Muon with tensor parallel 2: .* set it to 1"),
        (2, "zero1", {}, {"parallel": {"pipeline": 2}}, "Muon with pipeline 2: .* or use AdamW"),
        (1, "zero1", {}, {"adapter": "lora"}, "Muon with adapter 'lora': .* use AdamW"),
        (
            2,
            "zero3",
            {"zero_optimization": {"stage": 3, "reduce_scatter": True}},
            {},
            "zero_optimization.reduce_scatter true: Muon with ZeRO-3 needs false; leave it out",
        ),
    ],
)
def test_what_is_refused(world, zero, extra, sections, said, store, tmp_path):
    with pytest.raises(UserError, match=said):
        tiny.plan_of(recipe_of(store, tmp_path / "run", **sections), json_of(zero, **extra), world)


def test_recipe_and_json_must_agree(store, tmp_path):
    ds = json_of("zero3")
    ds["optimizer"]["params"] = {"muon_lr": 0.1, "momentum": 0.9}
    with pytest.raises(UserError, match=r"optimizer\.muon_lr is 0\.02, optimizer\.params\.muon_lr is 0\.1"):
        tiny.plan_of(recipe_of(store, tmp_path / "run"), ds, 1)
    plan = tiny.plan_of(recipe_of(store, tmp_path / "run", optimizer={"lr": 2e-3}), ds, 1)
    assert plan.recipe.optimizer.muon_lr == 0.1 and plan.deepspeed["optimizer"]["params"]["muon_lr"] == 0.1
    assert plan.deepspeed["zero_optimization"]["reduce_scatter"] is False
    assert plan.deepspeed["gradient_clipping"] == 0
    with pytest.raises(UserError, match=r"optimizer\.muon_lr: AdamW takes none; leave it out"):
        tiny.plan_of(recipe_of(store, tmp_path / "run"), tiny.tiny_json("zero1"), 1)
