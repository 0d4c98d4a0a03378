"""Turns pydantic's complaints about a recipe into one line that names file, line, key and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ...data_prep.errors import did_you_mean
from .text_files import dotted

# what people look for in the recipe, and where it is said instead
ELSEWHERE = {
    "micro_batch": "train_micro_batch_size_per_gpu of the DeepSpeed JSON",
    "micro_batch_size": "train_micro_batch_size_per_gpu of the DeepSpeed JSON",
    "train_micro_batch_size_per_gpu": "the DeepSpeed JSON",
    "gradient_accumulation_steps": "derived: global batch / (micro batch x data parallel)",
    "accumulation": "derived: global batch / (micro batch x data parallel)",
    "clip": "gradient_clipping of the DeepSpeed JSON",
    "gradient_clipping": "the DeepSpeed JSON",
    "precision": "bf16, fp16 or torch_autocast of the DeepSpeed JSON",
    "bf16": "the DeepSpeed JSON",
    "fp16": "the DeepSpeed JSON",
    "zero_stage": "zero_optimization.stage of the DeepSpeed JSON",
    "zero_optimization": "the DeepSpeed JSON",
    "tensor": "tensor_parallel.autotp_size of the DeepSpeed JSON",
    "sequence": "sequence_parallel_size of the DeepSpeed JSON",
    "data": "derived: devices / (pipeline x tensor x sequence)",
    "type": "optimizer.type of the DeepSpeed JSON",
}

# pydantic's kind of complaint: our words, where its own are not plain
PLAIN = {
    "model_type": "must be a mapping of keys",
    "dict_type": "must be a mapping of keys",
    "list_type": "must be a list",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "string_pattern_mismatch": "must be parameters, uniform, measured or type:REGEX",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
}


def explain(
    error: ValidationError, model: type[BaseModel], source: str, lines: Mapping[tuple[str | int, ...], int]
) -> str:
    """One line that lists every complaint."""
    problems = dict.fromkeys(_problem(detail, model, lines) for detail in error.errors())
    return f"{source}: " + "; ".join(problems)


def _problem(detail: Any, model: type[BaseModel], lines: Mapping[tuple[str | int, ...], int]) -> str:
    location = _without_tags(detail["loc"], model)
    where = dotted(location)
    if line := lines.get(location):
        where += f" (line {line})"
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return f"{where}: unknown key" + _advice(location, model)
    if kind == "missing":
        return f"{where}: missing"
    if kind == "value_error":
        text = str(detail["ctx"]["error"])
        return f"{where}: {text}" if where else text
    message = PLAIN.get(kind) or detail["msg"].replace("Input should", "must")
    return f"{where}: {message}, got {value!r}"


def _without_tags(location: tuple[str | int, ...], model: type[BaseModel]) -> tuple[str | int, ...]:
    """Pydantic adds the branch of a union ("constrained-int") to a location; the user wrote no such key."""
    kept: list[str | int] = []
    inside: Any = model
    for part in location:
        if isinstance(part, int):
            kept.append(part)
        elif (fields := _fields(inside)) is not None:
            kept.append(part)
            inside = fields.get(part)
    return tuple(kept)


def _fields(annotation: Any) -> dict[str, Any] | None:
    """Key → annotation of the section that an annotation holds, if it holds one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {field.alias or name: field.annotation for name, field in annotation.model_fields.items()}
    for argument in get_args(annotation):
        if (fields := _fields(argument)) is not None:
            return fields
    return None


def _advice(location: tuple[str | int, ...], model: type[BaseModel]) -> str:
    inside: Any = model
    for part in location[:-1]:
        if not isinstance(part, int):
            inside = (_fields(inside) or {}).get(part)
    key, siblings = str(location[-1]), list(_fields(inside) or {})
    if close := did_you_mean(key, siblings):
        return close
    if key in ELSEWHERE:
        return f"; that is {ELSEWHERE[key]}"
    sections = {name: _fields(annotation) or {} for name, annotation in (_fields(model) or {}).items()}
    if homes := [f"{name}.{key}" for name, keys in sections.items() if key in keys]:
        return f", did you mean {' or '.join(map(repr, homes))}?"
    return f"; known here: {', '.join(siblings)}"
