"""What a model family has no layout for: refused before the launch, with the sizes that would do or the reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..families.derived import Axis, Derived
from ..families.family import Family
from ..families.registry import FAMILIES, family_of
from ..families.specs import parameter_table
from ..families.tried import columns_of, outcomes
from ..objectives.registry import objective_of
from ..recipe.recipe import Recipe
from .layout import Layout
from .settings import Settings, section_of


def family_pipeline(layout: Layout, model: Mapping[str, Any]) -> Iterator[str]:
    """Refusals of pipeline stages."""
    family = family_of(model)
    if (refusal := _refused("pipeline", model, family)) is not None or family is None:
        yield f"pipeline {layout.pipeline} of model_type {model['model_type']!r}: {refusal}; set parallel.pipeline to 1"
        return
    layers = family.value(model, "num_hidden_layers")
    if layout.pipeline > layers:
        yield f"pipeline {layout.pipeline} is more stages than the model has layers ({layers}); use at most {layers}"


def family_tensor(layout: Layout, model: Mapping[str, Any]) -> Iterator[str]:
    """Refusals of a split over tensor ranks."""
    if layout.tensor == 1:
        return
    family = family_of(model)
    if (refusal := _refused("tensor", model, family)) is not None or family is None:
        yield f"tensor parallel {layout.tensor} of model_type {model['model_type']!r}: {refusal}; set it to 1"
        return
    if isinstance(family, Derived):
        yield from _derived_split(layout, model, family)
        return
    heads = family.value(model, "num_attention_heads")
    if heads % layout.tensor:
        yield f"tensor parallel {layout.tensor} does not divide the {heads} heads; sizes that do: {divisors(heads)}"
    kv_heads = family.value(model, "num_key_value_heads") or heads
    if kv_heads % layout.tensor and layout.tensor % kv_heads:
        yield f"tensor parallel {layout.tensor} neither divides nor is a multiple of the {kv_heads} key-value heads"
    table = parameter_table(model)
    inner_sizes = {spec.parts[0] for spec in table if spec.kind == "column" and spec.split and spec.split.grain == 1}
    for inner in sorted(inner_sizes):
        if inner % layout.tensor:
            yield f"tensor parallel {layout.tensor} does not divide the {inner} units of the MLP"
    if unknown := next((spec.name for spec in table if spec.kind == "unknown"), None):
        yield f"tensor parallel of {model['model_type']}: its record does not say whether {unknown} feeds split linears"


def _refused(axis: Axis, model: Mapping[str, Any], family: Family | Derived | None) -> str | None:
    """Why a family has no layout on an axis; None where it has one."""
    if family is None:
        return f"nothing is derived of it without torch and transformers; there are records of {', '.join(FAMILIES)}"
    return family.refusals.get(axis) if isinstance(family, Derived) else None


def _derived_split(layout: Layout, model: Mapping[str, Any], family: Derived) -> Iterator[str]:
    """Whether every split part of a derived table can be shared out, and its blocks then run."""
    size, lacking = layout.tensor, {}
    for spec in parameter_table(model, size):
        if spec.split is None or spec.kind == "vocab":
            continue
        for part in spec.parts:
            units = part // spec.split.grain
            copied = spec.split.grain > 1 and units == family.sizes["num_key_value_heads"] and size % units == 0
            if units % size and not copied:
                lacking.setdefault(family.relative(spec) or spec.name, units)
    for name, units in lacking.items():
        yield f"tensor parallel {size} does not divide the {units} units of {name}; sizes that do: {divisors(units)}"
    if lacking:
        return
    from ..modeling.derived.shapes import shapes_fit

    if problem := shapes_fit(dict(model), size):
        yield f"tensor parallel {size} of model_type {model['model_type']!r}: split as transformers says, {problem}"


def family_sequence(recipe: Recipe, layout: Layout, model: Mapping[str, Any]) -> Iterator[str]:
    """Refusals of a split over sequence ranks."""
    size = layout.sequence
    if size == 1:
        return
    if layout.pipeline > 1:
        yield f"sequence parallel {size} with pipeline {layout.pipeline}: DeepSpeed cannot; set one of them to 1"
    if recipe.data.seq_len % size:
        yield f"sequence parallel {size} does not divide data.seq_len {recipe.data.seq_len}"
    family = family_of(model)
    if refusal := family is not None and _refused("sequence", model, family):
        yield f"sequence parallel {size} of model_type {model['model_type']!r}: {refusal}; set it to 1"
        return
    heads = (family.value(model, "num_attention_heads") if family else model.get("num_attention_heads")) or size
    among = f" of each of {layout.tensor} tensor-parallel ranks" if layout.tensor > 1 else ""
    heads //= layout.tensor
    if heads % size:
        yield f"sequence parallel {size} does not divide the {heads} heads{among}; sizes that do: {divisors(heads)}"
    kv_heads = max(1, (model.get("num_key_value_heads") or heads * layout.tensor) // layout.tensor)
    if kv_heads % size and size % kv_heads:
        yield f"sequence parallel {size} neither divides nor is a multiple of the {kv_heads} key-value heads{among}"


def family_texts(recipe: Recipe, model: Mapping[str, Any]) -> Iterator[str]:
    """Refusals of several texts in a sample that must not see each other."""
    reads = objective_of(recipe.objective).reads
    if not recipe.data.document_mask and (reads == "text" or (reads == "sft" and recipe.data.packing == "none")):
        return
    family = family_of(model)
    if not (isinstance(family, Derived) and family.stateful):
        return
    what, cure = {
        "text": ("data.document_mask", "leave it out"),
        "sft": ("records packed into samples", "set data.packing to none"),
        "dpo": ("objective dpo, whose pairs share a sample,", "use another family"),
    }[reads]
    yield (
        f"{what} with model_type {model['model_type']!r}: its state goes on from text to text, which no mask keeps "
        f"apart; {cure}"
    )


def family_routers(recipe: Recipe, layout: Layout, model: Mapping[str, Any]) -> Iterator[str]:
    """Refusals of what `model.router` asks for."""
    stated = [key for key, value in recipe.model.router.model_dump().items() if value]
    if not stated:
        return
    asked = f"model.router.{' and '.join(stated)} of model_type {model['model_type']!r}"
    routing: Any = "it has no router"
    if not isinstance(family_of(model), Family):
        from ..anatomy.routing import BIAS, routing_of

        routing = routing_of(model)
        if not isinstance(routing, str) and "bias_update" in stated and not routing.biases:
            yield f"model.router.bias_update of model_type {model['model_type']!r}: its routers have no {BIAS}"
    if isinstance(routing, str):
        yield f"{asked}: {routing}; leave it out"
    if layout.pipeline > 1:
        yield f"{asked} with pipeline {layout.pipeline}: labels, by which tokens count, reach the last stage alone"
    if recipe.compile != "none":
        yield f"{asked} with compile {recipe.compile}: compiled blocks are not listened to; set compile to none"
    if not objective_of(recipe.objective).per_token:
        yield f"{asked}: its mean is over tokens, that of the objective is not; leave it out"
    if "bias_update" in stated and recipe.adapter != "none":
        yield "model.router.bias_update with an adapter: its checkpoints do not hold the biases; leave it out"


def family_experts(recipe: Recipe, settings: Settings, layout: Layout, model: Mapping[str, Any]) -> Iterator[str]:
    """Refusals of ranks that share the experts of a layer."""
    size, stage = layout.expert, layout.zero_stage
    if size == 1:
        return
    asked, family = f"expert_parallel.autoep_size {size}", family_of(model)
    if not isinstance(family, Derived):
        yield f"{asked} of model_type {model['model_type']!r}: it has no experts; leave expert_parallel out"
        return
    if refusal := family.refusals.get("expert"):
        yield f"{asked} of model_type {model['model_type']!r}: {refusal}; leave expert_parallel out"
    elif family.each_layer % size:
        yield f"{asked} does not divide the {family.each_layer} experts; sizes that do: {divisors(family.each_layer)}"
    for name, other in (("tensor parallel", layout.tensor), ("pipeline", layout.pipeline)):
        if other > 1:
            yield f"{asked} with {name} {other}: untried; set one of them to 1"
    if stage == 0:
        yield f"{asked} with ZeRO-0: use zero_optimization.stage 1, 2 or 3"
    for key in ("reduce_scatter", "contiguous_gradients"):
        if stage in (1, 2) and section_of(settings.json, "zero_optimization", key) is False:
            yield f"zero_optimization.{key} false with {asked}: DeepSpeed cannot; leave it out"
    if settings.hpz > 1:
        yield f"zero_optimization.zero_hpz_partition_size {settings.hpz} with {asked}: DeepSpeed cannot; leave it out"
    if settings.precision.name == "fp16" or settings.sum_width > settings.precision.width:
        what = "fp16" if settings.precision.name == "fp16" else "data_types.grad_accum_dtype fp32"
        yield f"{what} with {asked}: untried; use bf16, torch_autocast or neither"
    if not settings.optimizer.elementwise:
        yield f"{settings.optimizer_type} with {asked}: untried; use AdamW"
    if recipe.compile != "none":
        yield f"compile {recipe.compile} with {asked}: how many tokens an expert gets changes; set compile to none"
    if recipe.adapter != "none":
        yield f"an adapter with {asked}: untried; leave expert_parallel out"
    if objective_of(recipe.objective).reference:
        yield f"{asked} with an objective that compares with the model before training: untried; leave it out"


def family_tried(layout: Layout, model: Mapping[str, Any]) -> Iterator[str]:
    """Refusals of what did not follow one process when it was tried: wrong unsaid, or a traceback."""
    name = model["model_type"]
    cells = outcomes().get(name, {}).get("cells", {})
    if "fails" in cells.get("ZeRO-0", {}):  # then the small sizes that were tried are in doubt, not the layout
        return
    for column in columns_of(layout.zero_stage, layout.tensor, layout.pipeline, layout.sequence, layout.expert):
        for outcome in ("differs", "fails"):
            if said := cells.get(column, {}).get(outcome):
                yield (
                    f"{column} of model_type {name!r}: it was tried, small, and {outcome} ({said}); "
                    f"`zeropipe families {name}` lists what works"
                )


def divisors(number: int) -> str:
    """In words, for messages."""
    return ", ".join(str(size) for size in range(1, number + 1) if number % size == 0)
