"""The DeepSpeed JSON as typed settings: everything of it that this product reads, checked in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ...data_prep.errors import UserError, did_you_mean
from ..optim.base import Optimizer
from ..optim.registry import OPTIMIZERS, optimizer_of, optimizer_types
from ..recipe.precision import PRECISIONS, Precision
from ..recipe.text_files import dotted
from .deepspeed_keys import ALLOWED, DEEPSPEED_VERSION, OTHER_OPTIMIZERS, REMOVED, REMOVED_ZERO, SCHEDULERS, SECTIONS

AUTO = "auto"
BUCKET = 500_000_000  # DeepSpeed's default of every bucket, in elements
_DTYPES = {
    "fp32": ("fp32", "float32", "float"),
    "bf16": ("bf16", "bfloat16"),
    "fp16": ("fp16", "float16", "half"),
}


@dataclass(frozen=True)
class _Kind:
    """What a value must be, in words; `read` gives the value, or None where it is something else."""

    words: str
    read: Callable[[Any], Any]


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 else None


def _whole(value: Any) -> int | None:
    """5e8 is a float in JSON; as a count it is a whole number."""
    return int(value) if _number(value) is not None and value == value // 1 else None


_SWITCH = _Kind("true or false,", lambda value: value if isinstance(value, bool) else None)
_COUNT = _Kind("a positive whole number,", lambda value: value if type(value) is int and value > 0 else None)
_SIZE = _Kind("a positive whole number,", lambda value: 1 if value == 0 and type(value) is int else _COUNT.read(value))
_ELEMENTS = _Kind("a whole number of elements,", _whole)
_STAGE = _Kind("0, 1, 2 or 3,", lambda value: value if type(value) is int and value in range(4) else None)
_CLIPPING = _Kind("a number, 0 for none;", _number)


def _stated(path: str, kind: _Kind, default: Any = None) -> Any:
    return field(default=default, metadata={"path": tuple(path.split(".")), "kind": kind})


@dataclass(frozen=True)
class Settings:
    """Names and defaults are DeepSpeed's where it has them. None: not stated, and DeepSpeed has no default."""

    json: Mapping[str, Any]  # as stated, without null and, but for its own scheduler's, without "auto"
    precision: Precision
    optimizer: Optimizer
    activation_checkpointing: bool  # recompute activations: the section of that name is there, be it empty
    offload_optimizer: bool
    offload_param: bool
    global_batch: int | None = _stated("train_batch_size", _COUNT)
    micro_batch: int | None = _stated("train_micro_batch_size_per_gpu", _COUNT)
    accumulation: int | None = _stated("gradient_accumulation_steps", _COUNT)
    clipping: float = _stated("gradient_clipping", _CLIPPING, 1.0)
    tensor: int = _stated("tensor_parallel.autotp_size", _SIZE, 1)  # 0 is DeepSpeed's way to say none
    sequence: int = _stated("sequence_parallel_size", _SIZE, 1)
    expert: int = _stated("expert_parallel.autoep_size", _SIZE, 1)
    pipeline_stages: int | None = _stated("pipeline.stages", _COUNT)
    zero_stage: int = _stated("zero_optimization.stage", _STAGE, 0)
    hpz: int = _stated("zero_optimization.zero_hpz_partition_size", _SIZE, 1)
    overlap_comm: bool = _stated("zero_optimization.overlap_comm", _SWITCH, False)
    reduce_bucket_size: int = _stated("zero_optimization.reduce_bucket_size", _ELEMENTS, BUCKET)
    allgather_bucket_size: int = _stated("zero_optimization.allgather_bucket_size", _ELEMENTS, BUCKET)
    sub_group_size: int = _stated("zero_optimization.sub_group_size", _ELEMENTS, 10**9)
    prefetch_bucket_size: int = _stated("zero_optimization.stage3_prefetch_bucket_size", _ELEMENTS, 50_000_000)
    persistence_threshold: int = _stated("zero_optimization.stage3_param_persistence_threshold", _ELEMENTS, 100_000)
    max_live_parameters: int = _stated("zero_optimization.stage3_max_live_parameters", _ELEMENTS, 10**9)
    max_reuse_distance: int = _stated("zero_optimization.stage3_max_reuse_distance", _ELEMENTS, 10**9)

    @property
    def optimizer_type(self) -> str:
        """As the JSON spells it."""
        return section_of(self.json, "optimizer", "type") or self.optimizer.types[0]

    @property
    def optimizer_params(self) -> Mapping[str, Any]:
        return section_of(self.json, "optimizer", "params") or {}

    @property
    def sum_width(self) -> int:
        """Bytes of a gradient while those of several micro batches are summed."""
        dtype = str(section_of(self.json, "data_types", "grad_accum_dtype")).removeprefix("torch.")
        return 4 if dtype in _DTYPES["fp32"] else self.precision.width

    @property
    def scheduler(self) -> Mapping[str, Any] | None:
        """The JSON's own scheduler, which replaces the recipe's schedule."""
        return section_of(self.json, "scheduler")


def read_settings(ds: Mapping[str, Any], source: str = "DeepSpeed JSON") -> Settings:
    """Reads a DeepSpeed JSON.

    Raises:
        UserError: one line that lists keys that DeepSpeed does not read or has dropped, values of a wrong type or
            range, and values that would break what this product promises.
    """
    json, problems, values = without_auto(ds), unknown_keys(ds), {}
    if isinstance(scheduler := ds.get("scheduler"), dict):
        json["scheduler"] = scheduler
        if (kind := scheduler.get("type")) not in SCHEDULERS:
            problems.append(f"scheduler.type {kind!r}: DeepSpeed has {', '.join(SCHEDULERS)}")
    for known in (known for known in fields(Settings) if known.metadata):
        path, kind = known.metadata["path"], known.metadata["kind"]
        if (value := section_of(json, *path)) is not None:
            values[known.name] = kind.read(value)
            if values[known.name] is None:
                problems.append(f"{dotted(path)} must be {kind.words} got {value!r}")
    values |= {key: _offload(json, key, problems) for key in ("offload_optimizer", "offload_param")}
    values["optimizer"], values["precision"] = _optimizer(json, problems), _precision(json, problems)
    _data_types(json, values["precision"], problems)
    _expert(json, problems)
    for path, allowed, why in ALLOWED:
        if (value := section_of(json, *path)) is not None and value not in allowed:
            said = "" if isinstance(value, Mapping) else f" {str(value).lower()}"
            problems.append(f"{dotted(path)}{said}: {why}")
    if problems:
        raise UserError(f"{source}: " + "; ".join(problems))
    recomputes = isinstance(section_of(ds, "activation_checkpointing"), dict)
    recomputes = recomputes or bool(section_of(json, "pipeline", "activation_checkpoint_interval"))
    return Settings(json=json, activation_checkpointing=recomputes, **values)


def unknown_keys(ds: Mapping[str, Any]) -> list[str]:
    """Complaints about keys that DeepSpeed would silently ignore, or refuse only after the launch."""
    optimizer = optimizer_of(section_of(ds, "optimizer", "type") or "AdamW")
    sections = dict(SECTIONS)
    if optimizer is not None:
        sections["optimizer", "params"] = frozenset({*optimizer.keys, *optimizer.options})
    problems = []
    for path, known in sections.items():
        section = section_of(ds, *path)
        if section is None or section == AUTO:
            continue
        if not isinstance(section, dict):
            problems.append(f"{dotted(path)}: must be an object, got {section!r}")
            continue
        removed = REMOVED if path == () else REMOVED_ZERO if path == ("zero_optimization",) else {}
        for key in section:
            where = dotted((*path, key))
            if key in removed:
                problems.append(f"{where}: gone from DeepSpeed {DEEPSPEED_VERSION}; {removed[key]}")
            elif path == ("optimizer", "params") and key == "max_grad_norm":
                problems.append(f"{where}: write gradient_clipping at the top level")
            elif key not in known:
                homes = [repr(dotted((*path, key))) for path, keys in sections.items() if key in keys]
                nearest = f", did you mean {' or '.join(homes)}?" if homes else ""
                problems.append(f"{where}: unknown key" + (did_you_mean(key, known) or nearest))
    return problems


def section_of(ds: Mapping[str, Any], *path: str) -> Any:
    """The value at a key path, or None where it is absent or null."""
    value: Any = ds
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def without_auto(ds: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without what is null or "auto"."""
    kept = {key: value for key, value in ds.items() if value is not None and value != AUTO}
    return {key: without_auto(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def precision_of(ds: Mapping[str, Any]) -> Precision:
    """What a JSON computes in, whatever else is in it.

    Raises:
        UserError: more than one of bf16, fp16 and torch_autocast is on, or autocast to something else than bfloat16.
    """
    problems: list[str] = []
    precision = _precision(without_auto(ds), problems)
    if problems:
        raise UserError("DeepSpeed JSON: " + "; ".join(problems))
    return precision


def _precision(json: Mapping[str, Any], problems: list[str]) -> Precision:
    on = []
    for key in ("bf16", "fp16", "torch_autocast"):
        enabled = section_of(json, key, "enabled")
        if enabled not in (None, True, False):
            problems.append(f"{key}.enabled must be true or false, got {enabled!r}")
        elif enabled:
            on.append(key)
    if len(on) > 1:
        problems.append(f"{' and '.join(on)} are both enabled; enable one")
    if "torch_autocast" not in on:
        return PRECISIONS[on[0] if on else "fp32"]
    dtype = str(section_of(json, "torch_autocast", "dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in ("bfloat16", "bf16"):
        problems.append(f"torch_autocast.dtype {dtype!r}: use bfloat16, or enable fp16 instead")
    return PRECISIONS["bf16_autocast"]


def _optimizer(json: Mapping[str, Any], problems: list[str]) -> Optimizer:
    kind = section_of(json, "optimizer", "type")
    optimizer = OPTIMIZERS["adamw"] if kind is None else optimizer_of(kind)
    if optimizer is None:
        why = OTHER_OPTIMIZERS.get(str(kind).lower())
        problems.append(f"optimizer.type {kind!r}: {f'{why}; ' if why else ''}use {' or '.join(optimizer_types())}")
    return optimizer or OPTIMIZERS["adamw"]


def _data_types(json: Mapping[str, Any], precision: Precision, problems: list[str]) -> None:
    computes = precision.name if precision.name in _DTYPES else "fp32"
    for key in ("grad_accum_dtype", "param_dtype"):
        dtype = section_of(json, "data_types", key)
        allowed = _DTYPES[computes]
        if key == "grad_accum_dtype" and computes == "bf16":
            allowed = (*allowed, *_DTYPES["fp32"])
        if dtype is not None and str(dtype).removeprefix("torch.") not in allowed:
            problems.append(
                f"data_types.{key} {dtype!r} with {precision}: untried with our checkpoints; use {computes}"
            )


def _expert(json: Mapping[str, Any], problems: list[str]) -> None:
    enabled, size = (section_of(json, "expert_parallel", key) for key in ("enabled", "autoep_size"))
    if enabled not in (None, True, False):
        problems.append(f"expert_parallel.enabled must be true or false, got {enabled!r}")
    elif enabled and size is None:
        problems.append("expert_parallel.enabled without autoep_size: state over how many ranks, or leave both out")
    elif not enabled and size not in (None, 0, 1):
        problems.append(f"expert_parallel.autoep_size {size} does nothing without enabled: add it, or leave both out")


def _offload(json: Mapping[str, Any], key: str, problems: list[str]) -> bool:
    device = section_of(json, "zero_optimization", key, "device") or "none"
    if device == "nvme":
        problems.append(f"zero_optimization.{key}.device nvme: checkpoints cannot read what is on it; use cpu")
    elif device not in ("cpu", "none"):
        problems.append(f"zero_optimization.{key}.device {device!r}: use cpu or none")
    return device == "cpu"
