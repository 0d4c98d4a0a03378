"""One file each: an objective, an optimizer, an adapter and a sink of others train, save, resume and export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.harness import run_ranks
from tests.toys import adapter, objective, optimizer, sink
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.checkpoint.reader import Checkpoint
from zeropipe.trainer.export.huggingface import export
from zeropipe.trainer.metrics.reading import read_metrics
from zeropipe.trainer.testing.curves import plain_model, whole_batch
from zeropipe.trainer.testing.plain import Curve, decayed_groups, mean_loss, train_plainly

pytestmark = pytest.mark.distributed

TOYS = (adapter, objective, optimizer, sink)  # registered by being imported, on the ranks too
MODEL = {"model": {"config": {**tiny.LLAMA, "tie_word_embeddings": False}}}
LAYOUTS = {
    "one": (1, "zero0", {}, 1),
    "dp2-zero1": (2, "zero1", {}, 1),
    "dp2-zero3": (2, "zero3", {}, 1),
    "tp2": (2, "zero1", {"tensor_parallel": {"autotp_size": 2}}, 1),
    "sp2": (2, "zero2", {"sequence_parallel_size": 2}, 1),
    "pp2": (2, "zero1", {}, 2),
}
STEPS = 6


def weighted_loss(losses: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    weights = 1 + 4 * (labels % 2 == 0)
    return (losses * weights).sum() / weights.sum()


def plain(recipe: dict[str, Any], kind: str) -> Curve:
    """One process without DeepSpeed or anything of ours but the order of the data and the initial values."""
    from zeropipe.trainer.engine.base import planned_rate
    from zeropipe.trainer.ranks.ranks import Ranks
    from zeropipe.trainer.run.data import RunData

    plan = tiny.plan_of({**recipe, "objective": "causal_lm"}, tiny.tiny_json(micro=8), 1)
    model = plain_model(plan)
    trained = scale_outputs(model) if kind == "adapter" else list(model.parameters())
    groups = decayed_groups(trained, 0.1)
    if kind == "optimizer":
        torch_optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9)
    else:
        torch_optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)

    def set_rate(step: int) -> None:
        for group in torch_optimizer.param_groups:
            group["lr"] = planned_rate(plan, step)

    loss = weighted_loss if kind == "objective" else mean_loss
    with RunData.open(plan).stream(Ranks()) as stream:
        batches = (whole_batch(stream.next_step(), torch.device("cpu")) for _ in range(plan.total_steps))
        return train_plainly(model, batches, torch_optimizer, 0.3, set_rate, loss)


def scale_outputs(model: Any) -> list[torch.nn.Parameter]:
    """Everything frozen, and the output of every down projection scaled."""
    model.requires_grad_(False)
    found = []
    for name, module in list(model.named_modules()):
        if name.endswith("mlp.down_proj"):
            module.scale = torch.nn.Parameter(torch.ones(module.out_features))
            module.register_forward_hook(lambda own, _inputs, output: output * own.scale)
            found.append(module.scale)
    return found


KINDS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {  # sections of the recipe and of the JSON
    "objective": ({"objective": {"type": "weighted_tokens", "even": 5.0}}, {}),
    "optimizer": (
        {"optimizer": {"lr": 0.1, "weight_decay": 0.1}},
        {"optimizer": {"type": "ToyMomentum", "params": {"momentum": 0.9}}},
    ),
    "adapter": ({"adapter": "scale"}, {}),
}


def recipe_of(kind: str, folder: Path, stages: int = 1, run: str = "run", **sections: Any) -> dict[str, Any]:
    own = {**MODEL, "parallel": {"pipeline": stages}, "duration": {"steps": STEPS}, "save": {"every": 3}}
    return tiny.tiny_recipe(folder / "store", folder / run, **{**own, **KINDS[kind][0], **sections})


def train(kind: str, folder: Path, layout: str, **sections: Any) -> dict[str, Any]:
    """Trains in fresh processes; every train record by step."""
    world, zero, extra, stages = LAYOUTS[layout]
    recipe = recipe_of(kind, folder, stages, **sections)
    run_ranks(world, _train, recipe, tiny.tiny_json(zero, **extra, **KINDS[kind][1]))
    records = [record for record in read_metrics(recipe["output"]) if record["kind"] == "train"]
    return {key: [record[key] for record in records] for key in records[0]}


def _train(recipe: dict[str, Any], ds: dict[str, Any]) -> int:
    assert TOYS
    return tiny._train(recipe, ds)


@pytest.fixture(scope="module")
def truths(tmp_path_factory) -> Callable[[str], Curve]:
    folder, known = tmp_path_factory.mktemp("truth"), {}
    tiny.tiny_store(folder / "store")

    def truth(kind: str) -> Curve:
        if kind not in known:
            known[kind] = plain({**recipe_of(kind, folder), "adapter": "none"}, kind)
        return known[kind]

    return truth


# each kind on one rank, partitioned, and on one more layout; the rest in `make verify`
FAST = [*((kind, layout) for kind in KINDS for layout in ("one", "dp2-zero3"))]
FAST += [("objective", "sp2"), ("optimizer", "tp2"), ("adapter", "pp2")]
CASES = [
    pytest.param(kind, layout, marks=() if (kind, layout) in FAST else pytest.mark.slow)
    for kind in KINDS
    for layout in LAYOUTS
    if (kind, layout) != ("adapter", "tp2")
]


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_it_trains_as_plain_torch_does(kind, layout, tmp_path, truths):
    tiny.tiny_store(tmp_path / "store")
    truth, found = truths(kind), train(kind, tmp_path, layout)
    assert found["loss"] == pytest.approx(truth.losses, rel=1e-6)
    assert found["grad_norm"] == pytest.approx(truth.norms, rel=1e-5)
    assert min(truth.norms) > 0.3 or kind == "adapter", "clipping is not active"
    checkpoint = Checkpoint.open(tmp_path / "run")
    trained = {name for name in truth.weights if kind != "adapter" or name.endswith(".scale")}
    assert set(checkpoint.names()) == trained
    for name, weight in ((name, truth.weights[name]) for name in trained):
        # of its norm: Adam blows up the rounding noise of single elements
        expected = torch.from_numpy(weight)
        assert torch.dist(checkpoint.read(name), expected) <= 1e-4 * expected.norm(), name


CONSTANT = {"schedule": {"type": "constant", "warmup": 0}}


@pytest.fixture(scope="module")
def steady(tmp_path_factory) -> Callable[[str], list[float]]:
    """Losses of a run of a kind on one rank, without a stop."""
    folder = tmp_path_factory.mktemp("steady")
    tiny.tiny_store(folder / "store")
    return cache(lambda kind: train(kind, folder, "one", run=kind, **CONSTANT)["loss"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), [("one", "dp2-zero3"), ("dp2-zero1", "one")])
def test_it_resumes_on_another_layout_and_is_exported(kind, before, after, tmp_path, steady):
    """With the sink, too, which gets every step across the resume."""
    tiny.tiny_store(tmp_path / "store")
    sections = {**CONSTANT, "log": {"sinks": ["csv"]}}
    train(kind, tmp_path, before, duration={"steps": 3}, **sections)
    found = train(kind, tmp_path, after, **sections)
    assert found["step"] == list(range(1, STEPS + 1))
    assert found["loss"] == pytest.approx(steady(kind), rel=1e-6)
    lines = [line.split(",") for line in (tmp_path / "run" / "losses.csv").read_text().splitlines()]
    assert [int(step) for step, _ in lines] == found["step"]
    assert [float(loss) for _, loss in lines] == found["loss"]
    assert not (tmp_path / "run" / "tensorboard").exists()
    kinds = {"optimizer": ["master", "momentum_buffer"]}.get(kind, ["exp_avg", "exp_avg_sq", "master"])
    checkpoint = Checkpoint.open(tmp_path / "run")
    trained = [name for name in checkpoint.names() if kind != "adapter" or name.endswith(".scale")]
    assert all(checkpoint.kinds(name) == kinds for name in trained) and trained

    done = export(tmp_path / "run")  # verified against the logits of training
    assert done.deviation is not None and done.deviation < 1e-5
    model = AutoModelForCausalLM.from_pretrained(done.folder)
    assert not [name for name, _ in model.named_parameters() if name.endswith(".scale")]


@pytest.mark.parametrize("kind", [pytest.param("objective", marks=pytest.mark.slow), "optimizer", "adapter"])
def test_a_resume_on_the_same_layout_is_the_same_bit_for_bit(kind, tmp_path):
    tiny.tiny_store(tmp_path / "store")
    whole = train(kind, tmp_path, "dp2-zero3", run="whole", **CONSTANT)
    train(kind, tmp_path, "dp2-zero3", duration={"steps": 3}, **CONSTANT)
    assert train(kind, tmp_path, "dp2-zero3", **CONSTANT)["loss"] == whole["loss"]


def test_an_objectives_metrics_are_logged_in_training_and_evaluation(tmp_path):
    tiny.tiny_store(tmp_path / "store")
    for layout in ("one", "pp2", "sp2"):
        train("objective", tmp_path, layout, run=layout, eval={"every": 3, "batches": 2})
    found = {layout: read_metrics(tmp_path / layout) for layout in ("one", "pp2", "sp2")}
    for layout in ("pp2", "sp2"):
        for kind in ("train", "eval"):
            one, other = ([r for r in found[name] if r["kind"] == kind] for name in ("one", layout))
            assert [r["loss/even"] for r in other] == pytest.approx([r["loss/even"] for r in one], rel=1e-6)
            assert [r["loss"] for r in other] == pytest.approx([r["loss"] for r in one], rel=1e-6)
    assert "perplexity" not in next(r for r in found["one"] if r["kind"] == "eval")  # not nats per token
    assert 0 < found["one"][1]["loss/even"] < found["one"][1]["loss"]


def test_a_batch_without_weight_is_refused_by_its_samples(tmp_path):
    tiny.tiny_store(tmp_path / "store")
    recipe = recipe_of("objective", tmp_path, objective={"type": "weighted_tokens", "even": 0.0})
    with pytest.raises(Exception, match=r"samples 0 to 7 hold nothing to train on"):
        run_ranks(2, _train_even_only, recipe, tiny.tiny_json("zero1"))


def _train_even_only(recipe: dict[str, Any], ds: dict[str, Any]) -> int:
    objective.WeightedTokens.weight = lambda self, batch: 0.0
    return tiny._train(recipe, ds)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"objective": "weighted_token"}, r"no objective 'weighted_token', did you mean 'weighted_tokens'\?"),
        ({"objective": {"type": "weighted_tokens", "evn": 2}}, r"unknown option 'evn', did you mean 'even'\?"),
        ({"adapter": {"type": "scale", "rank": 8}}, r"adapter scale: unknown option 'rank'"),
        ({"log": {"sinks": ["tensorbord"]}}, r"log\.sinks: no metric sink 'tensorbord', did you mean 'tensorboard'\?"),
    ],
)
def test_a_name_or_option_that_is_not_known_is_refused_by_the_plan(sections, said, tmp_path):
    tiny.tiny_store(tmp_path / "store")
    with pytest.raises(UserError, match=said):
        tiny.plan_of(recipe_of("adapter", tmp_path, **sections), tiny.tiny_json(), 1)


def test_an_adapter_that_is_not_exact_when_split_is_refused_by_the_plan(tmp_path):
    tiny.tiny_store(tmp_path / "store")
    ds = tiny.tiny_json("zero1", tensor_parallel={"autotp_size": 2})
    with pytest.raises(UserError, match=r"adapter 'scale' with tensor parallel 2"):
        tiny.plan_of(recipe_of("adapter", tmp_path), ds, 2)


def test_an_optimizer_takes_its_own_keys_alone(tmp_path):
    tiny.tiny_store(tmp_path / "store")
    recipe = recipe_of("optimizer", tmp_path, optimizer={"lr": 0.1, "betas": [0.9, 0.95]})
    with pytest.raises(UserError, match=r"betas"):
        tiny.plan_of(recipe, tiny.tiny_json(**KINDS["optimizer"][1]), 1)
