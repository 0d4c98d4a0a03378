"""Every layout that a run can have on a number of devices, with what a step of it would take."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...data_prep.errors import UserError
from ..adapters.base import rows_of
from ..adapters.registry import adapter_of
from ..objectives.registry import objective_of
from ..plan.deepspeed_json import reconcile
from ..plan.layout import Layout
from ..plan.legality import check
from ..plan.memory import MemoryEstimate, estimate_memory
from ..plan.plan import Plan, make_plan
from ..plan.rank_sizes import Sizes, stage_sizes
from ..plan.settings import BUCKET, Settings, read_settings
from ..plan.work import uncounted
from ..recipe.recipe import Recipe
from .compute import Training
from .cost import Cost, predict
from .hardware import Device

MOST_MICRO = 64  # sequences of a micro batch
SHARE = 0.94  # of a device's memory that a plan may take: the rest is the library's and the allocator's
OWNED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "pipeline")


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to run the recipe."""

    layout: Layout
    micro_batch: int
    checkpointing: bool
    ds: Mapping[str, Any]  # the DeepSpeed JSON to write
    settings: Settings  # of that JSON, resolved
    cost: Cost
    memory: MemoryEstimate
    fits: bool

    def __str__(self) -> str:
        recomputes = ", activations recomputed" if self.checkpointing else ""
        return f"{self.layout}, micro batch {self.micro_batch}{recomputes}"


@dataclass(frozen=True)
class Found:
    """What a search found: all that is legal, the fastest that fits first; then what would not fit, fastest first."""

    candidates: Sequence[Candidate]
    refused: Mapping[str, int]  # why plans were refused, and how many

    @property
    def fitting(self) -> list[Candidate]:
        """Those whose memory fits the device."""
        return [candidate for candidate in self.candidates if candidate.fits]


def search(recipe: Recipe, ds: Mapping[str, Any], devices: int, device: Device) -> Found:
    """Ranks every layout, ZeRO stage, micro batch, offload and checkpointing that `make_plan` takes.

    Args:
        ds: what it does not have to decide is kept: precision, optimizer, clipping, buckets.

    Raises:
        UserError: the family has no table, no global batch is stated, or nothing at all is legal.
    """
    base = base_plan(recipe, ds)
    recipe = recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"global_batch": base.global_batch})})
    estimates = _Estimates(recipe, base, device)
    found, refused = [], {}
    for layout in layouts(devices):
        on_layout = with_pipeline(recipe, layout.pipeline)
        try:
            settings = _resolved(on_layout, json_for(ds, layout, 1, False, device), layout, base)
            check(on_layout, settings, layout, base.model_config)
        except UserError as error:
            reason = str(error).removeprefix("recipe and DeepSpeed JSON do not agree: ").split(":")[0].split(";")[0]
            refused[reason] = refused.get(reason, 0) + 1
            continue
        for micro in micro_batches(base.global_batch, layout):
            for recomputes in (False, True):
                json = json_for(ds, layout, micro, recomputes, device)
                found.append(estimates.candidate(on_layout, json, layout))
    if not found:
        raise UserError(f"no layout of {devices} devices is legal: " + "; ".join(refused))
    return Found(sorted(found, key=lambda one: (not one.fits, one.cost.seconds, one.memory.peak)), refused)


def base_plan(recipe: Recipe, ds: Mapping[str, Any]) -> Plan:
    """The run on one device, whose model, data and global batch every layout has.

    Raises:
        UserError: nothing is known of the family's work; or as `make_plan`.
    """
    alone = Layout(world=1, data=1, zero_stage=1)
    json = {key: value for key, value in json_for(ds, alone, 1, False, None).items() if key != OWNED[1]}
    if isinstance(whole := ds.get("train_batch_size"), int):
        json["train_batch_size"] = whole
    if recipe.batch.global_batch is None and "train_batch_size" not in json:
        raise UserError(
            "tune keeps the global batch, whatever the layout: state batch.global (sequences of one step) in the recipe"
        )
    plan = make_plan(with_pipeline(recipe, 1), json, 1)
    family = plan.model_config["model_type"]
    if reason := uncounted(plan.model_config):
        raise UserError(
            f"tune cannot count the work of model_type {family!r}: {reason}. Such a model trains all the same, on the "
            "layouts that `zeropipe plan` takes: try them with --deepspeed_config"
        )
    return plan


def training_of(plan: Plan) -> Training:
    """What a plan trains, whatever its layout."""
    recipe = plan.recipe
    rows, uniform = rows_of(adapter_of(recipe.adapter)), objective_of(recipe.objective).uniform
    return Training(plan.model_config, plan.seq_len, recipe.parallel.partition, rows, uniform=uniform)


def predicted_seconds(plan: Plan, device: Device) -> float | None:
    """Of a step; None where the work of the model cannot be counted."""
    if uncounted(plan.model_config):
        return None
    return predict(training_of(plan), plan.layout, plan.settings, device).seconds


def with_pipeline(recipe: Recipe, stages: int) -> Recipe:
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"pipeline": stages})})


def layouts(devices: int) -> Iterator[Layout]:
    """Every product of axes that makes up the devices, on every ZeRO stage, with and without offload.

    A pipeline's ZeRO-0 is left out: it is run as ZeRO-1.
    """
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    for pipeline in sizes:
        for tensor in (size for size in sizes if devices // pipeline % size == 0):
            for sequence in (size for size in sizes if devices // pipeline // tensor % size == 0):
                data = devices // pipeline // tensor // sequence
                whole = Layout(devices, data, tensor, sequence, pipeline)
                for stage in range(pipeline > 1, 4):
                    yield replace(whole, zero_stage=stage)
                    if stage:
                        yield replace(whole, zero_stage=stage, offload_optimizer=True)
                    if stage == 3:
                        yield replace(whole, zero_stage=3, offload_optimizer=True, offload_param=True)


def micro_batches(global_batch: int, layout: Layout) -> list[int]:
    """Sizes that a rank's share of the global batch can be cut into."""
    if global_batch % layout.data:
        return []
    share = global_batch // layout.data
    return [size for size in range(1, min(share, MOST_MICRO) + 1) if share % size == 0]


def json_for(
    ds: Mapping[str, Any], layout: Layout, micro: int, recomputes: bool, device: Device | None
) -> dict[str, Any]:
    """The DeepSpeed JSON of a layout: `ds` but for what the layout decides."""
    json = {key: copy.deepcopy(value) for key, value in ds.items() if key not in OWNED}
    for key in ("tensor_parallel", "sequence_parallel_size", "activation_checkpointing"):
        json.pop(key, None)
    zero = {key: value for key, value in json.get("zero_optimization", {}).items() if not key.startswith("offload_")}
    zero["stage"] = layout.zero_stage
    if layout.pipeline > 1 or layout.zero_stage == 0:
        zero.pop("overlap_comm", None)
    elif device is not None and device.queued and layout.data * layout.sequence > 1:
        zero.setdefault("overlap_comm", True)
    stated = ds.get("zero_optimization", {})
    for name, on in (("offload_optimizer", layout.offload_optimizer), ("offload_param", layout.offload_param)):
        if on:
            zero[name] = {"pin_memory": True, **stated.get(name, {}), "device": "cpu"}
    json["zero_optimization"] = zero
    json["train_micro_batch_size_per_gpu"] = micro
    if layout.tensor > 1:
        json["tensor_parallel"] = {"autotp_size": layout.tensor}
    if layout.sequence > 1:
        json["sequence_parallel_size"] = layout.sequence
    if recomputes:
        json["activation_checkpointing"] = dict(ds.get("activation_checkpointing") or {})
    return json


def _resolved(recipe: Recipe, json: Mapping[str, Any], layout: Layout, base: Plan) -> Settings:
    """The JSON as `make_plan` resolves it, without opening the data again. UserError where it would refuse."""
    resolved = reconcile(recipe, read_settings(json), layout)
    if layout.zero_stage > 0 or layout.pipeline > 1:
        assert base.parameters is not None
        resolved["zero_optimization"].setdefault("reduce_bucket_size", min(BUCKET, base.parameters))
    return read_settings(resolved)


class _Estimates:
    """Costs and memory of the candidates of one search."""

    def __init__(self, recipe: Recipe, base: Plan, device: Device) -> None:
        self.base, self.device, self.rate = base, device, recipe.optimizer.embedding_rate
        self.training = training_of(base)
        self.mlp_tile = recipe.mlp_tile
        self._sizes: dict[tuple[int, int], list[tuple[Sizes, int]]] = {}

    def candidate(self, recipe: Recipe, json: dict[str, Any], layout: Layout) -> Candidate:
        settings, device = _resolved(recipe, json, layout, self.base), self.device
        memory, cost = self._memory(layout, settings), predict(self.training, layout, settings, device)
        # on a CPU what is offloaded is in the same memory
        needed = memory.peak + (0 if device.queued else memory.host)
        fits = needed <= SHARE * device.memory
        assert settings.micro_batch is not None
        recomputes = settings.activation_checkpointing
        return Candidate(layout, settings.micro_batch, recomputes, json, settings, cost, memory, fits)

    def _memory(self, layout: Layout, settings: Settings) -> MemoryEstimate:
        training, key = self.training, (layout.tensor, layout.pipeline)
        if key not in self._sizes:
            shape = training.model, *key, training.partition
            self._sizes[key] = stage_sizes(*shape, settings.optimizer, training.rows, self.rate)
        if layout.pipeline > 1:  # the engine runs ZeRO-0 in a pipeline as ZeRO-1
            layout = replace(layout, zero_stage=max(1, layout.zero_stage))
        head_and_mlp = {"uniform": training.uniform, "mlp_tile": self.mlp_tile}
        return estimate_memory(
            training.model, layout, settings, training.seq_len, stages=self._sizes[key], **head_and_mlp
        )


def plan_of_candidate(recipe: Recipe, one: Candidate) -> Plan:
    """The whole plan of a candidate, as `zeropipe plan` makes it."""
    batch = recipe.batch.model_copy(update={"global_batch": one.settings.global_batch})
    changed = with_pipeline(recipe, one.layout.pipeline).model_copy(update={"batch": batch})
    return make_plan(changed, one.ds, one.layout.world)
