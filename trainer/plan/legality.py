"""What DeepSpeed 0.19.8 cannot do, or does wrongly without a word: refused before the launch, with alternatives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...data_prep.errors import UserError
from ..adapters.base import rows_of
from ..adapters.qlora import Qlora
from ..adapters.registry import adapter_of
from ..families.registry import FAMILIES, family_of
from ..families.specs import parameter_table
from ..optim.groups import grouped
from ..recipe.recipe import Recipe
from .family_layouts import (
    divisors,
    family_experts,
    family_pipeline,
    family_routers,
    family_sequence,
    family_tensor,
    family_texts,
    family_tried,
)
from .layout import Layout
from .model_config import longest_sequence
from .settings import Settings, section_of
from .stages import split_layers


def layout_of(recipe: Recipe, settings: Settings, devices: int) -> Layout:
    """The layout that the recipe and the JSON ask for on `devices` ranks.

    Raises:
        UserError: the devices are no multiple of the product of the parallel sizes.
    """
    tensor, sequence, pipeline = settings.tensor, settings.sequence, recipe.parallel.pipeline
    model = tensor * sequence * pipeline
    if devices < 1 or devices % model:
        near = sorted({max(1, devices // model) * model, -(-devices // model) * model} - {0})
        raise UserError(
            f"{devices} devices do not fit pipeline {pipeline} x tensor {tensor} x sequence {sequence} = {model}; "
            f"nearest: {' or '.join(map(str, near))} devices, or smaller parallel sizes"
        )
    replicas, expert = devices // (tensor * pipeline), settings.expert
    if replicas % expert:
        raise UserError(
            f"expert_parallel.autoep_size {expert} does not divide the {replicas} ranks that see different tokens; "
            f"sizes that do: {divisors(replicas)}"
        )
    return Layout(
        world=devices,
        data=devices // model,
        tensor=tensor,
        sequence=sequence,
        pipeline=pipeline,
        zero_stage=settings.zero_stage,
        offload_optimizer=settings.offload_optimizer,
        offload_param=settings.offload_param,
        expert=expert,
    )


def check(recipe: Recipe, settings: Settings, layout: Layout, model: Mapping[str, Any]) -> None:
    """Refuses what cannot run or would train wrongly.

    Args:
        settings: of the resolved JSON.
        model: the complete model configuration.

    Raises:
        UserError: one line that lists every refusal, each with its alternatives.
    """
    refusals = [*_precision(settings, layout), *_offload(layout), *_hpz(settings, layout)]
    refusals += [*_pipeline(settings, layout, model)]
    refusals += [*_optimizer(recipe, settings, layout)]
    refusals += [
        *family_tensor(layout, model),
        *family_sequence(recipe, layout, model),
        *family_texts(recipe, model),
        *family_tried(layout, model),
        *family_routers(recipe, layout, model),
        *family_experts(recipe, settings, layout, model),
        *_adapter(recipe, settings, layout, model),
    ]
    if not refusals:
        refusals += [*_groups(recipe, settings, layout, model)]
    if recipe.mlp_tile and getattr(FAMILIES.get(model["model_type"]), "mlp", None) is None:
        refusals.append(
            f"mlp_tile of model_type {model['model_type']!r}: its record names no MLP, or there is none; leave it out, "
            "and add an activation_checkpointing section to the DeepSpeed JSON"
        )
    refusals += [*_replicas(recipe, layout)]
    longest = longest_sequence(model)
    if longest is not None and recipe.data.seq_len > longest:
        refusals.append(
            f"data.seq_len {recipe.data.seq_len} is longer than the model takes: use data.seq_len={longest} or less, "
            "or raise the model's positions"
        )
    if refusals:
        raise UserError("; ".join(refusals))


def _precision(settings: Settings, layout: Layout) -> Iterator[str]:
    name, alone = settings.precision.name, layout.pipeline == 1
    if settings.sum_width > settings.precision.width and not alone:
        yield (
            "data_types.grad_accum_dtype fp32 with a pipeline: DeepSpeed's BF16_Optimizer then clips by a wrong norm; "
            "leave it out, or use torch_autocast, which sums in fp32"
        )
    if settings.sum_width > settings.precision.width and layout.zero_stage == 0 and alone:
        yield "data_types.grad_accum_dtype fp32 with ZeRO-0: needs zero_optimization.stage 1, 2 or 3"
    if layout.zero_stage > 0:
        return
    if name == "bf16" and alone:
        yield (
            "bf16 with ZeRO-0: DeepSpeed starts Adam's step count at 1 there, and the losses are wrong from the first "
            "update; use zero_optimization.stage 1 (also on one rank), torch_autocast, or fp32"
        )
    if name == "fp16" and alone:
        yield (
            "fp16 with ZeRO-0: DeepSpeed does not scale the loss there, but divides the gradients by the scale; use "
            "zero_optimization.stage 1 (also on one rank)"
        )
    if name == "fp16" and not alone:
        yield "fp16 with ZeRO-0 and a pipeline: use zero_optimization.stage 1"


def _offload(layout: Layout) -> Iterator[str]:
    if layout.offload_optimizer and layout.zero_stage == 0 and layout.pipeline == 1:  # pipelines run it as stage 1
        yield "offload_optimizer with ZeRO-0: needs zero_optimization.stage 1, 2 or 3"
    if layout.offload_param and layout.zero_stage != 3:
        yield f"offload_param with ZeRO-{layout.zero_stage}: needs zero_optimization.stage 3; or leave it out"


def _hpz(settings: Settings, layout: Layout) -> Iterator[str]:
    """ZeRO++'s second partition of the parameters, within hosts."""
    size, key = settings.hpz, "zero_optimization.zero_hpz_partition_size"
    if size == 1:
        return
    if layout.zero_stage != 3:
        yield f"{key} {size} with ZeRO-{layout.zero_stage}: needs zero_optimization.stage 3; or leave it out"
    if layout.world % size:
        yield f"{key} {size} does not divide the {layout.world} ranks; sizes that do: {divisors(layout.world)}"
    if layout.tensor > 1:
        yield f"{key} {size} with tensor parallel {layout.tensor}: its groups would mix pieces; leave one of them out"


def _optimizer(recipe: Recipe, settings: Settings, layout: Layout) -> Iterator[str]:
    name, optimizer = settings.optimizer_type, settings.optimizer
    stated = section_of(settings.json, "zero_optimization") or {}
    for key, value in optimizer.zero_options.get(layout.zero_stage, {}).items():
        if stated.get(key, value) != value:
            yield (
                f"zero_optimization.{key} {str(stated[key]).lower()}: {name} with ZeRO-{layout.zero_stage} needs "
                f"{str(value).lower()}; leave it out"
            )
    if optimizer.elementwise:
        return
    if settings.clipping > 0:
        yield (
            f"gradient_clipping {settings.clipping} with {name}: DeepSpeed would clip finished updates of matrices, "
            "not gradients; set it to 0 or leave it out"
        )
    if layout.zero_stage == 0:
        yield f"{name} with ZeRO-0: use zero_optimization.stage 1, 2 or 3 (also on one rank)"
    if layout.tensor > 1:
        yield f"{name} with tensor parallel {layout.tensor}: it would work on pieces of matrices; set it to 1"
    if layout.pipeline > 1:
        yield f"{name} with pipeline {layout.pipeline}: untried; set parallel.pipeline to 1, or use AdamW"
    if adapter_of(recipe.adapter) is not None:
        yield f"{name} with adapter {recipe.adapter!r}: no matrix of the blocks is trained; use AdamW"


def _pipeline(settings: Settings, layout: Layout, model: Mapping[str, Any]) -> Iterator[str]:
    if layout.pipeline == 1:
        return
    if layout.zero_stage >= 2:
        yield (
            f"pipeline {layout.pipeline} with ZeRO-{layout.zero_stage}: pipelines need ZeRO-1; use "
            f"zero_optimization.stage 1, or parallel.pipeline=1 to keep ZeRO-{layout.zero_stage}"
        )
    if settings.overlap_comm:
        yield "zero_optimization.overlap_comm with a pipeline: set it to false"
    profiled = section_of(settings.json, "flops_profiler", "enabled")
    for key, on in (("wall_clock_breakdown", settings.json.get("wall_clock_breakdown")), ("flops_profiler", profiled)):
        if on:
            yield f"{key} with a pipeline: DeepSpeed starts a timer twice and fails; leave it out"
    yield from family_pipeline(layout, model)


def _qlora(settings: Settings) -> Iterator[str]:
    if settings.precision.name in ("bf16", "fp16"):
        yield (
            f"adapter qlora with {settings.precision}: DeepSpeed would cast norms, embeddings and head too, which "
            "QLoRA keeps in fp32; use torch_autocast, which computes in bf16"
        )


def _adapter(recipe: Recipe, settings: Settings, layout: Layout, model: Mapping[str, Any]) -> Iterator[str]:
    adapter = adapter_of(recipe.adapter)
    if adapter is None:
        return
    if layout.tensor > 1 and model["model_type"] not in FAMILIES:
        family = model["model_type"]
        yield f"an adapter with tensor parallel {layout.tensor} of model_type {family!r}: untried; set it to 1"
    if layout.tensor > 1 and not adapter.splits:
        yield f"adapter {recipe.adapter!r} with tensor parallel {layout.tensor}: not exact when split; set it to 1"
    if isinstance(adapter, Qlora):
        yield from _qlora(settings)
    if family_of(model) is not None:
        try:
            adapter.check(parameter_table(model))
        except UserError as error:
            yield str(error)


def _groups(recipe: Recipe, settings: Settings, layout: Layout, model: Mapping[str, Any]) -> Iterator[str]:
    """The optimizer's groups of parameters, and learning rates of their own."""
    known, rows = family_of(model) is not None, rows_of(adapter_of(recipe.adapter))
    table = parameter_table(model, layout.tensor) if known else []
    trained = [spec for spec in rows(table) if spec.trained]
    own = isinstance(recipe.adapter, dict) and recipe.adapter.get("lr_ratio", 1) != 1
    if recipe.optimizer.embedding_lr is not None:
        if not known:
            there = f"there are tables for {', '.join(FAMILIES)}"
            yield f"optimizer.embedding_lr of model_type {model['model_type']!r}: {there}"
        elif not any(spec.kind == "vocab" for spec in trained):
            yield "optimizer.embedding_lr: embedding and head are frozen; name them in modules_to_save, or leave it out"
    if settings.scheduler is not None and (own or recipe.optimizer.embedding_lr is not None):
        key = "adapter lr_ratio" if own else "optimizer.embedding_lr"
        yield f"{key} with a scheduler in the DeepSpeed JSON, which moves all alike; use the recipe's schedule instead"
    if layout.pipeline == 1:
        return
    groups = set()
    for stage in split_layers(table, layout.pipeline, recipe.parallel.partition):
        own_rows = [spec for spec in rows(stage.specs) if spec.trained]
        found = grouped(own_rows, lambda spec: spec, settings.optimizer, recipe.optimizer.embedding_rate)
        groups.add(tuple(str(sorted(group.options.items())) for group, _ in found))
    if len(groups) > 1:  # DeepSpeed reduces the gradients' norm group by group, over the stages too
        yield (
            f"pipeline {layout.pipeline}: its stages would differ in their groups of parameters (with and without "
            "weight decay, by learning rate), and DeepSpeed would wait for ever; use fewer stages or another "
            "parallel.partition, or leave out optimizer.embedding_lr and norms in modules_to_save"
        )


def _replicas(recipe: Recipe, layout: Layout) -> Iterator[str]:
    if not recipe.check_replicas:
        return
    if layout.zero_stage == 3:
        yield "check_replicas with ZeRO-3: each weight is on one rank, without copies; check_replicas=0"
    elif layout.world == layout.pipeline:
        yield f"check_replicas on {layout}: no rank holds a copy of another's weights; check_replicas=0"
