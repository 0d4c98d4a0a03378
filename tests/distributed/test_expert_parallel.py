"""Ranks that share the experts of a layer: the weights they come to, defects found, other sizes to go on in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.distributed.test_derived_families import ONE, _truth, recipe_for
from tests.distributed.test_mixtures import GLM, MIXTRAL, ROUTER, shared
from tests.distributed.test_reshape_matrix import _exported, _go_on
from tests.harness import run_ranks
from zeropipe.trainer.checkpoint.reader import Checkpoint
from zeropipe.trainer.plan.layout import Layout
from zeropipe.trainer.testing.parity import Bounds, plan_in, verdict

pytestmark = pytest.mark.distributed
QWEN = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tiny.tiny_store(tmp_path_factory.mktemp("experts") / "store")


def _wrong_denominator() -> None:
    """ZeRO-3 takes the stacks for whole ones, of which it averages over the ranks that hold them."""
    from zeropipe.trainer.modeling import build

    mark = build.mark_expert

    def of_whole_ones(parameter: Any, ranks: Any) -> None:
        mark(parameter, ranks)
        parameter.ds_zero_placement_family = "replicated"

    build.mark_expert = of_whole_ones


def _wrong_sum() -> None:
    """The gradients of an expert are those of a token for every rank that tokens come from."""
    from zeropipe.trainer.modeling import build

    mark = build.mark_expert

    def too_large(parameter: Any, ranks: Any) -> None:
        mark(parameter, ranks)
        parameter.register_hook(lambda gradient: gradient * ranks.expert_size)

    build.mark_expert = too_large


def _swapped_experts() -> None:
    from zeropipe.trainer.ranks.ranks import Ranks

    along = Ranks.along

    def other_way_round(self: Ranks, axis: Any) -> Any:
        place, size, group = along(self, axis)
        return (size - 1 - place if axis == "expert" else place), size, group

    Ranks.along = other_way_round


def _counted_once_too_often() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    def twice(self: Any, norms: list[Any]) -> None:
        for number, of_experts in enumerate(self.is_moe_param_group):
            norms[number] = norms[number] * 2**0.5 if of_experts else norms[number]

    DeepSpeedZeroOptimizer._average_expert_grad_norms = twice


def _answers_to_the_wrong_tokens() -> None:
    from zeropipe.trainer.modeling.mixtures.dispatch import SharedExperts

    exchange = SharedExperts._exchange
    SharedExperts._exchange = lambda self, rows, sent, received: exchange(self, rows.flip(0), sent, received)


# what is wrong, under which stage, and the first quantity that tells
DEFECTS: list[tuple[Callable[[], None], int, str]] = [
    (_wrong_denominator, 3, "step 1: gradient norm"),
    (_wrong_sum, 2, "step 1: gradient norm"),
    (_swapped_experts, 1, "step 1: loss"),
    (_counted_once_too_often, 2, "step 1: gradient norm"),
    (_answers_to_the_wrong_tokens, 2, "step 1: loss"),
]


@pytest.mark.parametrize(
    ("defect", "stage", "told"),
    [pytest.param(*row, marks=pytest.mark.slow, id=row[0].__name__) for row in DEFECTS],
)
def test_planted_defects_are_found(defect, stage, told, store):
    recipe = recipe_for("qwen3_moe", store, QWEN)
    [truth] = run_ranks(1, _truth, plan_in(recipe, tiny.tiny_json(), ONE, 2))
    plan = plan_in(recipe, tiny.tiny_json(), Layout(2, 2, zero_stage=stage, expert=2), 2)
    assert verdict(plan, truth, Bounds()).difference is None
    found = verdict(plan, truth, Bounds(), defect)
    assert found.difference is not None and found.difference.startswith(told), found.difference


LAYOUTS = [
    Layout(size, size, zero_stage=stage, expert=ep) for size, ep in ((2, 2), (4, 2), (4, 4)) for stage in (1, 2, 3)
]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_losses_norms_and_weights_are_those_of_one_process(store):
    recipe = recipe_for("qwen3_moe", store, QWEN)
    [truth] = run_ranks(1, _truth, plan_in(recipe, tiny.tiny_json(), ONE, 20), timeout=600)
    for layout in LAYOUTS:
        found = verdict(plan_in(recipe, tiny.tiny_json(), layout, 20), truth, Bounds())
        assert found.difference is None, str(found)


def _apart(favoured: tuple[int, ...]) -> tuple[dict[str, float], bool]:
    """How far a layer's experts shared by two ranks are from all of them on one, of tokens that go to a few experts;
    and whether experts that got none have a gradient of zeros.
    """
    from transformers import AutoConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    from zeropipe.trainer.modeling.mixtures.dispatch import SharedExperts
    from zeropipe.trainer.ranks.ranks import join_world

    ranks = join_world().lay_out(1, 1, 1, 2)
    config = AutoConfig.for_model(**MIXTRAL, vocab_size=128)
    config._experts_implementation = "eager"
    whole, part = MixtralExperts(config).double(), MixtralExperts(config).double()
    generator = torch.Generator().manual_seed(1)
    for name, p in whole.named_parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1
        own = p.data[4 * ranks.expert : 4 * ranks.expert + 4].clone()
        setattr(part, name, torch.nn.Parameter(own))
    shared_layer = SharedExperts(part, ranks)
    tokens = [torch.randn(5 + 2 * rank, 32, generator=generator, dtype=torch.double) for rank in range(2)]
    choices = [
        torch.tensor(favoured)[torch.randint(0, len(favoured), (len(t), 2), generator=generator)] for t in tokens
    ]
    weights = [torch.rand(len(t), 2, generator=generator, dtype=torch.double) for t in tokens]
    outputs, found = {}, {}
    for layer, of in ((whole, (0, 1)), (shared_layer, (ranks.rank,))):
        x, w = ([t.clone().requires_grad_() for t in (tensors[r] for r in of)] for tensors in (tokens, weights))
        out = [layer(x[n], choices[r], w[n]) for n, r in enumerate(of)]
        sum((o * (r + 1)).square().sum() for o, r in zip(out, of, strict=True)).backward()
        at = of.index(ranks.rank)
        outputs[layer] = out[at].detach(), x[at].grad, w[at].grad
    for name, one, other in zip(("output", "token", "weight"), outputs[whole], outputs[shared_layer], strict=True):
        found[name] = float((one - other).abs().max())
    for name, p in part.named_parameters():
        theirs = getattr(whole, name).grad[4 * ranks.expert : 4 * ranks.expert + 4]
        found[name] = float("inf") if p.grad is None else float((p.grad - theirs).abs().max())
    starved = ranks.expert not in {expert // 4 for expert in favoured}
    return found, not starved or all(p.grad is not None and not p.grad.any() for p in part.parameters())


@pytest.mark.parametrize("favoured", [(0, 1, 2, 3, 4, 5, 6, 7), (5, 6), (0,)], ids=["all", "of-one-rank", "one"])
def test_experts_that_get_no_token_wait_for_nobody(favoured):
    for found, zeros in run_ranks(2, _apart, favoured):
        assert max(found.values()) < 1e-13 and zeros, found


PLACES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "ep1-zero1": (1, "zero1", {}),
    "ep4-zero2": (4, "zero2", shared(4)),
    "ep2-dp2-zero3": (4, "zero3", shared(2)),
    "tp2-zero3": (2, "zero3", {"tensor_parallel": {"autotp_size": 2}}),
    "ep2-zero1": (2, "zero1", shared(2)),
    "dp2-zero3": (2, "zero3", {}),
}


@pytest.mark.parametrize(
    "chain",
    [
        pytest.param(["ep1-zero1", "ep4-zero2"], id="two"),
        pytest.param(list(PLACES), id="all", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_experts_shared_otherwise(chain, store, tmp_path):
    """Weights, moments, biases and exports bitwise, whoever held them; the next losses those of a run left alone."""
    sections = {"model": {"config": GLM, "router": {**ROUTER, "bias_update": 0.01}}}
    sections["schedule"] = {"type": "constant", "warmup": 0}

    def recipe(name: str, steps: int) -> dict[str, Any]:
        return tiny.tiny_recipe(store, tmp_path / name, duration={"steps": steps}, **sections)

    steady = tiny.train_on_ranks(1, recipe("steady", 5), tiny.tiny_json("zero1"))["loss"]
    tiny.train_on_ranks(2, recipe("source", 3), tiny.tiny_json("zero2", 2, **shared(2)))
    whole, source = _exported(tmp_path / "source"), tmp_path / "source"
    first = Checkpoint.open(source)
    for name in chain:
        ranks, zero, ds = PLACES[name]
        losses = run_ranks(ranks, _go_on, recipe(name, 5), tiny.tiny_json(zero, 2, **ds), str(source))[0]
        assert losses == pytest.approx(steady[3:], rel=1e-6)
        source = tmp_path / name
        now = Checkpoint.open(source)
        assert now.names() == first.names()
        for held in first.names():
            for kind in ("master",) if held.endswith("bias") else ("master", "exp_avg", "exp_avg_sq"):
                assert now.read(held, kind).numpy().tobytes() == first.read(held, kind).numpy().tobytes(), (name, held)
        (source / "recipe.yaml").write_text((tmp_path / "source" / "recipe.yaml").read_text())
        assert _exported(source) == whole
