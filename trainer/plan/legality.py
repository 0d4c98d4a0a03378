"""What DeepSpeed 0.19.8 cannot do, or does wrongly without a word: refused before the launch, with alternatives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...data_prep.errors import UserError
from ..families.registry import FAMILIES
from ..families.specs import parameter_table
from ..recipe.recipe import Recipe
from .deepspeed_json import checkpoints_activations, precision_of, section_of, stated
from .deepspeed_keys import OPTIMIZERS, SCHEDULERS
from .layout import Layout
from .legality_table import Combination, nearest_working, shipped_table
from .model_config import longest_sequence


def layout_of(recipe: Recipe, ds: Mapping[str, Any], devices: int) -> Layout:
    """The layout that the recipe and the JSON ask for on `devices` ranks.

    Raises:
        UserError: a size is no positive number, or the devices are no multiple of their product.
    """
    tensor = _size(ds, "tensor_parallel", "autotp_size")
    sequence = _size(ds, "sequence_parallel_size")
    pipeline = recipe.parallel.pipeline
    model = tensor * sequence * pipeline
    if devices < 1 or devices % model:
        near = sorted({max(1, devices // model) * model, -(-devices // model) * model} - {0})
        raise UserError(
            f"{devices} devices do not fit pipeline {pipeline} x tensor {tensor} x sequence {sequence} = {model}; "
            f"nearest: {' or '.join(map(str, near))} devices, or smaller parallel sizes"
        )
    stage = stated(ds, "zero_optimization", "stage")
    stage = 0 if stage is None else stage
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise UserError(f"DeepSpeed JSON: zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")
    return Layout(
        world=devices,
        data=devices // model,
        tensor=tensor,
        sequence=sequence,
        pipeline=pipeline,
        zero_stage=stage,
        offload_optimizer=_device(ds, "offload_optimizer") != "none",
        offload_param=_device(ds, "offload_param") != "none",
    )


def check(recipe: Recipe, ds: Mapping[str, Any], layout: Layout, model: Mapping[str, Any]) -> None:
    """Refuses what cannot run or would train wrongly.

    Args:
        ds: the resolved JSON.
        model: the complete model configuration.

    Raises:
        UserError: one line that lists every refusal, each with its alternatives.
    """
    refusals = [*_precision(ds, layout), *_offload(ds, layout), *_pipeline(ds, layout, model)]
    refusals += [*_tensor(layout, model), *_sequence(recipe, layout, model), *_settings(ds)]
    longest = longest_sequence(model)
    if longest is not None and recipe.data.seq_len > longest:
        refusals.append(
            f"data.seq_len {recipe.data.seq_len} is longer than the model takes: use data.seq_len={longest} or less, "
            "or raise the model's positions"
        )
    if refusals or (refusals := [*_tried(ds, layout)]):
        raise UserError("; ".join(refusals))


def _precision(ds: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    precision = precision_of(ds)
    if precision == "bf16" and layout.zero_stage == 0 and layout.pipeline == 1:
        yield (
            "bf16 with ZeRO-0: DeepSpeed starts Adam's step count at 1 there, and the losses are wrong from the first "
            "update; use zero_optimization.stage 1 (also on one rank), torch_autocast, or fp32"
        )
    if precision == "fp16" and layout.zero_stage == 0 and layout.pipeline > 1:
        yield "fp16 with ZeRO-0 and a pipeline: use zero_optimization.stage 1"
    computes = {"bf16": "bf16", "fp16": "fp16"}.get(precision, "fp32")
    for key in ("grad_accum_dtype", "param_dtype"):
        dtype = stated(ds, "data_types", key)
        if dtype is not None and str(dtype).removeprefix("torch.") not in _DTYPES[computes]:
            yield f"data_types.{key} {dtype!r} with {precision}: untried with our checkpoints; use {computes}"


def _offload(ds: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    if layout.offload_optimizer and layout.zero_stage == 0 and layout.pipeline == 1:  # pipelines run it as stage 1
        yield "offload_optimizer with ZeRO-0: needs zero_optimization.stage 1, 2 or 3"
    if layout.offload_param and layout.zero_stage != 3:
        yield f"offload_param with ZeRO-{layout.zero_stage}: needs zero_optimization.stage 3; or leave it out"
    ratio = stated(ds, "zero_optimization", "offload_optimizer", "ratio")
    if ratio is not None and ratio < 1 and layout.zero_stage != 3:
        yield f"offload_optimizer.ratio {ratio} with ZeRO-{layout.zero_stage}: needs stage 3; or use ratio 1.0"
    for key in ("offload_optimizer", "offload_param"):
        if (device := _device(ds, key)) == "nvme":
            yield f"zero_optimization.{key}.device nvme: checkpoints cannot read it; use cpu"
        elif device not in ("cpu", "none"):
            yield f"zero_optimization.{key}.device {device!r}: use cpu or none"


def _pipeline(ds: Mapping[str, Any], layout: Layout, model: Mapping[str, Any]) -> Iterator[str]:
    if layout.pipeline == 1:
        return
    if layout.zero_stage >= 2:
        yield (
            f"pipeline {layout.pipeline} with ZeRO-{layout.zero_stage}: pipelines need ZeRO-1; use "
            f"zero_optimization.stage 1, or parallel.pipeline=1 to keep ZeRO-{layout.zero_stage}"
        )
    if stated(ds, "zero_optimization", "overlap_comm"):
        yield "zero_optimization.overlap_comm with a pipeline: set it to false"
    family = FAMILIES.get(model["model_type"])
    if family is None:
        yield f"pipeline of model_type {model['model_type']!r}: there are stages for {', '.join(FAMILIES)}"
        return
    layers = family.value(model, "num_hidden_layers")
    if layout.pipeline > layers:
        yield f"pipeline {layout.pipeline} is more stages than the model has layers ({layers}); use at most {layers}"


def _tensor(layout: Layout, model: Mapping[str, Any]) -> Iterator[str]:
    if layout.tensor == 1:
        return
    family = FAMILIES.get(model["model_type"])
    if family is None:
        yield f"tensor parallel of model_type {model['model_type']!r}: there are tables for {', '.join(FAMILIES)}"
        return
    heads = family.value(model, "num_attention_heads")
    if heads % layout.tensor:
        yield f"tensor parallel {layout.tensor} does not divide the {heads} heads; sizes that do: {_divisors(heads)}"
    kv_heads = family.value(model, "num_key_value_heads") or heads
    if kv_heads % layout.tensor and layout.tensor % kv_heads:
        yield f"tensor parallel {layout.tensor} neither divides nor is a multiple of the {kv_heads} key-value heads"
    table = parameter_table(model)
    inner_sizes = {spec.parts[0] for spec in table if spec.kind == "column" and spec.tensor and spec.tensor.grain == 1}
    for inner in sorted(inner_sizes):
        if inner % layout.tensor:
            yield f"tensor parallel {layout.tensor} does not divide the {inner} units of the MLP"
    if unknown := next((spec.name for spec in table if spec.kind == "unknown"), None):
        yield f"tensor parallel of {model['model_type']}: its record does not say whether {unknown} feeds split linears"


def _sequence(recipe: Recipe, layout: Layout, model: Mapping[str, Any]) -> Iterator[str]:
    size = layout.sequence
    if size == 1:
        return
    if layout.pipeline > 1:
        yield f"sequence parallel {size} with pipeline {layout.pipeline}: DeepSpeed cannot; set one of them to 1"
    if recipe.data.seq_len % size:
        yield f"sequence parallel {size} does not divide data.seq_len {recipe.data.seq_len}"
    family = FAMILIES.get(model["model_type"])
    heads = (family.value(model, "num_attention_heads") if family else model.get("num_attention_heads")) or size
    among = f" of each of {layout.tensor} tensor-parallel ranks" if layout.tensor > 1 else ""
    heads //= layout.tensor
    if heads % size:
        yield f"sequence parallel {size} does not divide the {heads} heads{among}; sizes that do: {_divisors(heads)}"
    kv_heads = max(1, (model.get("num_key_value_heads") or heads * layout.tensor) // layout.tensor)
    if kv_heads % size and size % kv_heads:
        yield f"sequence parallel {size} neither divides nor is a multiple of the {kv_heads} key-value heads{among}"


def _tried(ds: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    """What no rule above knows, and did not work when it was tried."""
    clips, recomputes = bool(stated(ds, "gradient_clipping")), checkpoints_activations(ds)
    combination = Combination.of(layout, precision_of(ds), clips, recomputes)
    table = shipped_table()
    trial = table.trials.get(combination) or table.trials.get(combination.usual)
    if trial is not None and trial.outcome != "works":
        near = " or ".join(f"({way})" for way in nearest_working(combination, table))
        tried = f"tried with DeepSpeed {table.made_with['deepspeed']}: {trial.outcome}: {trial.detail}"
        yield f"{combination}: {tried}; nearest that works: {near}"


def _settings(ds: Mapping[str, Any]) -> Iterator[str]:
    optimizer = str(stated(ds, "optimizer", "type"))
    if optimizer.lower() not in [name.lower() for name in OPTIMIZERS]:
        yield f"optimizer.type {optimizer!r}: use {' or '.join(OPTIMIZERS)}"
    if section_of(ds, "scheduler") is not None and (kind := section_of(ds, "scheduler", "type")) not in SCHEDULERS:
        yield f"scheduler.type {kind!r}: DeepSpeed has {', '.join(SCHEDULERS)}"
    clipping = stated(ds, "gradient_clipping")
    if isinstance(clipping, bool) or not isinstance(clipping, int | float) or clipping < 0:
        yield f"gradient_clipping must be a number, 0 for none; got {clipping!r}"
    if stated(ds, "zero_optimization", "zenflow") is not None:
        yield "zero_optimization.zenflow: checkpoints cannot read it; leave it out"
    if (size := stated(ds, "zero_optimization", "zero_hpz_partition_size")) not in (None, 0, 1):
        yield f"zero_optimization.zero_hpz_partition_size {size}: untried; leave it out"
    for path, value, why in _WRONG:
        if stated(ds, *path) == value:
            yield f"{'.'.join(path)} {str(value).lower()}: {why}"


_DTYPES = {
    "fp32": ("fp32", "float32", "float"),
    "bf16": ("bf16", "bfloat16"),
    "fp16": ("fp16", "float16", "half"),
}

# settings that DeepSpeed takes and that would break what this project promises
_WRONG: tuple[tuple[tuple[str, ...], Any, str], ...] = (
    (("zero_optimization", "compute_grad_norm"), False, "the norm is logged at every step; leave it out"),
    (("zero_optimization", "legacy_stage1"), True, "gone from DeepSpeed; leave it out"),
    (("zero_optimization", "zero_quantized_weights"), True, "losses would depend on the layout; leave it out"),
    (("zero_optimization", "zero_quantized_gradients"), True, "losses would depend on the layout; leave it out"),
    (("zero_optimization", "zero_quantized_nontrainable_weights"), True, "checkpoints cannot read it; leave it out"),
    (("zero_optimization", "offload_optimizer", "super_offload"), True, "checkpoints cannot read it; leave it out"),
    (("bf16", "bf16_master_weights_and_grads"), True, "checkpoints hold fp32 master weights; leave it out"),
    (("fp16", "fp16_master_weights_and_grads"), True, "checkpoints hold fp32 master weights; leave it out"),
    (("compile", "deepcompile"), True, "untried; leave it out"),
    (("managed_gradient_accumulation",), False, "the training loop relies on it; leave it out"),
    (("gradient_allreduce_op",), "sum", "the step would depend on the number of ranks; use mean"),
    (("data_efficiency", "enabled"), True, "it draws samples in an order of its own; leave it out"),
    (("hybrid_engine", "enabled"), True, "not supported; leave it out"),
    (("autotuning", "enabled"), True, "not supported; state the micro batch"),
    (("checkpoint", "load_universal"), True, "checkpoints resume on any layout without it; leave it out"),
)


def _size(ds: Mapping[str, Any], *path: str) -> int:
    size = stated(ds, *path) or 1  # autotp_size 0 is DeepSpeed's way to say none
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UserError(f"DeepSpeed JSON: {'.'.join(path)} must be a positive whole number, got {size!r}")
    return size


def _device(ds: Mapping[str, Any], key: str) -> str:
    return str(stated(ds, "zero_optimization", key, "device") or "none")


def _divisors(number: int) -> str:
    return ", ".join(str(size) for size in range(1, number + 1) if number % size == 0)
