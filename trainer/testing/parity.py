"""The parity gate: every legal layout of a few ranks must follow one process of plain Hugging Face and torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data_prep.errors import UserError
from ..families.declared import declared_keys
from ..families.registry import family_of
from ..families.specs import gradient_noise
from ..objectives.registry import objective_of
from ..plan.layout import Layout
from ..plan.plan import Plan, make_plan
from ..recipe.recipe import Recipe
from .local_ranks import RankFailed, on_local_ranks

if TYPE_CHECKING:
    from .curves import Curve, Sabotage

PRECISION_KEYS = ("bf16", "fp16", "torch_autocast")


@dataclass(frozen=True)
class Bounds:
    """Largest relative difference of every loss, every gradient norm, and the final weights together."""

    loss: float = 1e-6
    norm: float = 1e-5
    weights: float = 1e-4


@dataclass(frozen=True)
class Verdict:
    """How far a layout is from one process; `difference` names the first step and quantity beyond the bounds."""

    layout: Layout
    loss: float
    norm: float
    weights: float
    difference: str | None

    def __str__(self) -> str:
        figures = f"{self.loss:8.1e} {self.norm:8.1e} {self.weights:8.1e}"
        return f"{self.layout!s:<44} {figures}  {self.difference or 'same'}"


HEADING = f"{'layout':<44} {'loss':>8} {'norm':>8} {'weights':>8}"


def parity(
    recipe: Recipe, ds: Mapping[str, Any], ranks: int = 4, steps: int = 20, bounds: Bounds | None = None
) -> Iterator[Verdict]:
    """Trains `steps` steps in fp32, without dropout, noise or penalties, on every legal layout of 1, 2, 4 … `ranks`
    ranks of this machine.

    Raises:
        UserError: the recipe cannot be planned on one rank, or has an adapter or an objective that weights tokens.
    """
    from .curves import one_process

    plans = plans_of(recipe, ds, ranks, steps)
    [truth] = on_local_ranks(1, one_process, plans[0])
    for plan in plans:
        yield verdict(plan, truth, bounds or Bounds())


def verdict(plan: Plan, truth: Curve, bounds: Bounds, sabotage: Sabotage | None = None) -> Verdict:
    """Trains the plan's layout and compares it with one process."""
    from .curves import masks_differ, of_layout

    try:
        found = on_local_ranks(plan.layout.world, of_layout, plan, sabotage)[0]
        if plan.layout.tensor > 1:
            arguments = plan.model_config, plan.layout.tensor, sabotage
            found.masks_differ = all(on_local_ranks(plan.layout.tensor, masks_differ, *arguments))
    except RankFailed as failure:
        nothing = float("nan")
        return Verdict(plan.layout, nothing, nothing, nothing, str(failure).strip().splitlines()[-1])
    return compare(plan, found, truth, bounds)


def compare(plan: Plan, found: Curve, truth: Curve, bounds: Bounds) -> Verdict:
    """Losses, gradient norms and weights of a layout against those of one process."""
    losses, norms = _apart(found.losses, truth.losses), _apart(found.norms, truth.norms)
    weights = _weights_apart(found.weights, truth.weights, gradient_noise(plan.model_config))
    difference = _first_difference(losses, norms, weights, found, truth, bounds)
    if difference is not None and (name := _first_apart(found, truth)):
        difference += f"; {plan.model_config['model_type']}'s {name} is the first apart"
    return Verdict(plan.layout, max(losses), max(norms), weights, difference)


def _first_difference(
    losses: Sequence[float], norms: Sequence[float], weights: float, found: Curve, truth: Curve, bounds: Bounds
) -> str | None:
    for step in range(len(losses)):
        # not "greater": a NaN must not pass
        if not losses[step] <= bounds.loss:
            return f"step {step + 1}: loss {found.losses[step]:.8g}, one process {truth.losses[step]:.8g}"
        if not norms[step] <= bounds.norm:
            return f"step {step + 1}: gradient norm {found.norms[step]:.8g}, one process {truth.norms[step]:.8g}"
        if step == 0 and found.torn_at_once:
            return f"step 1: ranks hold unlike copies of {', '.join(found.torn_at_once)}"
    if not weights <= bounds.weights:
        return f"step {len(losses)}: weights are {weights:.1e} of their norm away"
    if found.torn:
        return f"step {len(losses)}: ranks hold unlike copies of {', '.join(found.torn)}"
    if found.masks_differ is False:
        return "step 1: tensor ranks drop the same attention probabilities"
    return None


def _first_apart(found: Curve, truth: Curve) -> str | None:
    """The parameter that is furthest from the truth after the first step; None where none is beyond rounding."""
    if found.torn_at_once:
        return found.torn_at_once[0]
    apart = {
        name: float(np.linalg.norm(found.first[name] - weight) / (np.linalg.norm(weight) or 1.0))
        for name, weight in truth.first.items()
        if name in found.first
    }
    name = max(apart, key=lambda name: apart[name], default=None)
    return name if name is not None and apart[name] > 1e-5 else None


def _apart(found: Sequence[float], truth: Sequence[float]) -> list[float]:
    return [abs(one / two - 1) for one, two in zip(found, truth, strict=True)]


def _weights_apart(
    found: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray], noise: Mapping[str, slice]
) -> float:
    """Norm of the difference of all weights, without those whose gradient is `noise`, over the norm of all weights."""
    assert found.keys() == truth.keys(), f"only in one of the two: {sorted(found.keys() ^ truth.keys())}"
    squares = 0.0
    for name, weight in truth.items():
        difference = found[name] - weight
        if name in noise:
            difference = np.delete(difference, noise[name])
        squares += float(np.square(difference).sum())
    whole = sum(float(np.square(weight).sum()) for weight in truth.values())
    return (squares / whole) ** 0.5


def plans_of(recipe: Recipe, ds: Mapping[str, Any], ranks: int, steps: int) -> list[Plan]:
    """Plans of every legal layout, one process first.

    Raises:
        UserError: as `parity`.
    """
    first = plan_in(recipe, ds, Layout(world=1, data=1, zero_stage=0), steps)
    if not objective_of(recipe.objective).uniform:
        raise UserError(f"parity compares losses of tokens that count alike, not the objective {recipe.objective!r}")
    if recipe.adapter != "none":
        raise UserError(
            f"parity trains the whole model, which the adapter {recipe.adapter!r} does not; say adapter=none"
        )
    plans = [first]
    for layout in _layouts(ranks):
        if layout == first.layout:
            continue
        try:
            plans.append(plan_in(recipe, ds, layout, steps))
        except UserError:  # not legal for this model, or the global batch cannot be shared so
            continue
    return plans


def _layouts(ranks: int) -> Iterator[Layout]:
    worlds = [1 << power for power in range(ranks.bit_length()) if 1 << power <= ranks]
    for world in worlds:
        sizes = [size for size in worlds if size <= world]
        for pipeline, tensor, sequence in itertools.product(sizes, repeat=3):
            model = pipeline * tensor * sequence
            if world % model == 0:
                for stage in range(4):
                    yield Layout(world, world // model, tensor, sequence, pipeline, stage)
        for expert, stage in itertools.product(sizes[1:], (1, 2, 3)):
            yield Layout(world, world, zero_stage=stage, expert=expert)


def plan_in(recipe: Recipe, ds: Mapping[str, Any], layout: Layout, steps: int) -> Plan:
    """The recipe's plan on another layout, in fp32, without dropout, noise or penalties, with two micro batches or more
    where it can.
    """
    config, family = recipe.model.config, family_of(recipe.model.config)
    if family is not None:
        dropout = list(family.dropout.values())
    else:
        keys = declared_keys(config.get("model_type", "")) or ()
        dropout = [key for key in keys if key.endswith(("dropout", "pdrop"))]
    quiet_model = {**config, **dict.fromkeys(dropout, 0.0)}
    objective = recipe.objective
    if not isinstance(objective, str):
        added = ("neftune", "label_smoothing", "z_loss")  # which the plain loop does not know
        objective = {key: value for key, value in objective.items() if key not in added}
    changed = {
        "objective": objective,
        "model": recipe.model.model_copy(update={"config": quiet_model}),
        "parallel": recipe.parallel.model_copy(update={"pipeline": layout.pipeline}),
        "duration": recipe.duration.model_copy(update={"steps": steps, "tokens": None, "epochs": None}),
    }
    batches = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    json = {key: value for key, value in ds.items() if key not in (*PRECISION_KEYS, *batches, "pipeline")}
    json["zero_optimization"] = {"stage": layout.zero_stage}
    json["tensor_parallel"] = {"autotp_size": layout.tensor}
    json["sequence_parallel_size"] = layout.sequence
    json.pop("expert_parallel", None)
    if layout.expert > 1:
        json["expert_parallel"] = {"enabled": True, "autoep_size": layout.expert}
    sequences = recipe.batch.global_batch or json.get("train_batch_size")
    if isinstance(sequences, int):
        json["train_micro_batch_size_per_gpu"] = max(1, sequences // layout.data // (2 * layout.pipeline))
    return make_plan(recipe.model_copy(update=changed), json, layout.world)
