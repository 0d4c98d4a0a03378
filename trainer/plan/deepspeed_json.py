"""The DeepSpeed JSON: read strictly, and reconciled with the recipe into one that DeepSpeed takes as it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

from ...data_prep.errors import UserError
from ..recipe.recipe import Recipe
from ..recipe.text_files import did_you_mean, dotted, parse_json, read_named
from .deepspeed_keys import DEEPSPEED_VERSION, REMOVED, REMOVED_ZERO, SECTIONS
from .layout import Layout

AUTO = "auto"
MICRO_BATCH_TOKENS = 4096
SCHEDULER_AUTO = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")

Precision = Literal["fp32", "bf16", "fp16", "bf16_autocast"]


def load_ds_config(path_or_name: str) -> dict[str, Any]:
    """Reads a DeepSpeed JSON, or a shipped one by its name ("zero2").

    Raises:
        UserError: not JSON, or keys that DeepSpeed does not read or has dropped; one line lists them all.
    """
    text, source = read_named(path_or_name, "ds_configs", ".json")
    ds = parse_json(text, source)
    if not isinstance(ds, dict):
        raise UserError(f"{source}: a DeepSpeed configuration is a JSON object; got {type(ds).__name__}")
    if problems := unknown_keys(ds):
        raise UserError(f"{source}: " + "; ".join(problems))
    return ds


def unknown_keys(ds: Mapping[str, Any]) -> list[str]:
    """Complaints about keys that DeepSpeed would silently ignore, or refuse only after the launch."""
    problems = []
    for path, known in SECTIONS.items():
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
                problems.append(f"{where}: unknown key" + (did_you_mean(key, known) or _home(key)))
    return problems


def section_of(ds: Mapping[str, Any], *path: str) -> Any:
    """The value at a key path, or None where it is absent or null."""
    value: Any = ds
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def stated(ds: Mapping[str, Any], *path: str) -> Any:
    """The value at a key path, or None where it is absent, null or "auto"."""
    value = section_of(ds, *path)
    return None if value == AUTO else value


def precision_of(ds: Mapping[str, Any]) -> Precision:
    """What the JSON computes in.

    Raises:
        UserError: more than one of bf16, fp16 and torch_autocast is on, or autocast to something else than bfloat16.
    """
    modes = ("bf16", "fp16", "torch_autocast")
    for key in modes:
        if (enabled := stated(ds, key, "enabled")) not in (None, True, False):
            raise UserError(f"DeepSpeed JSON: {key}.enabled must be true or false, got {enabled!r}")
    on = [key for key in modes if stated(ds, key, "enabled")]
    if len(on) > 1:
        raise UserError(f"DeepSpeed JSON: {' and '.join(on)} are both enabled; enable one")
    if on == ["torch_autocast"]:
        dtype = str(stated(ds, "torch_autocast", "dtype") or "bfloat16").removeprefix("torch.")
        if dtype not in ("bfloat16", "bf16"):
            raise UserError(f"DeepSpeed JSON: torch_autocast.dtype {dtype!r}: use bfloat16, or enable fp16 instead")
        return "bf16_autocast"
    return "bf16" if on == ["bf16"] else "fp16" if on == ["fp16"] else "fp32"


def checkpoints_activations(ds: Mapping[str, Any]) -> bool:
    """Whether activations are recomputed: the section `activation_checkpointing` is there, be it empty."""
    if isinstance(section_of(ds, "activation_checkpointing"), dict):
        return True
    return bool(stated(ds, "pipeline", "activation_checkpoint_interval"))


def reconcile(recipe: Recipe, ds: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The JSON with everything that is absent or "auto" filled from the recipe and the layout.

    What is stated in one of the two wins; what is stated in both must agree.

    Raises:
        UserError: one line that lists every mismatch.
    """
    clashes: list[str] = []
    resolved = copy.deepcopy(dict(ds))
    scheduler = resolved.pop("scheduler", None)
    _drop_auto(resolved)
    _batches(recipe, resolved, layout, clashes)
    _optimizer(recipe, resolved, clashes)
    if isinstance(scheduler, dict):
        resolved["scheduler"] = scheduler
        if "schedule" in recipe.model_fields_set:
            clashes.append("schedule: the recipe has a schedule and the JSON has scheduler; keep one")
    if (stages := stated(ds, "pipeline", "stages")) not in (None, recipe.parallel.pipeline):
        clashes.append(f"parallel.pipeline is {recipe.parallel.pipeline}, pipeline.stages is {stages}")
    if clashes:
        raise UserError("recipe and DeepSpeed JSON do not agree: " + "; ".join(clashes))
    if resolved.get("gradient_clipping") is None:
        resolved["gradient_clipping"] = 1.0  # DeepSpeed's default since 0.19, spelled out
    if stated(resolved, "torch_autocast", "enabled"):
        resolved["torch_autocast"].setdefault("dtype", "bfloat16")  # without it DeepSpeed stops at the first forward
    resolved["zero_optimization"] = {**resolved.get("zero_optimization", {}), "stage": layout.zero_stage}
    return resolved


def fill_scheduler(resolved: dict[str, Any], total_steps: int, warmup_steps: int) -> None:
    """Fills the "auto" values of the JSON's own scheduler in place.

    Raises:
        UserError: a value cannot be derived.
    """
    params = section_of(resolved, "scheduler", "params") or {}
    known = (0.0, resolved["optimizer"]["params"]["lr"], warmup_steps, total_steps)
    derived = dict(zip(SCHEDULER_AUTO, known, strict=True))
    for key in [key for key, value in params.items() if value == AUTO]:
        if key not in derived:
            raise UserError(f"DeepSpeed JSON: scheduler.params.{key} cannot be derived; state it instead of 'auto'")
        params[key] = derived[key]


def default_micro_batch(per_rank: int, seq_len: int, pipeline: int = 1) -> int:
    """The micro batch where nobody states one: the largest divisor of a rank's share of the global batch that keeps
    within 4,096 tokens and, with a pipeline, leaves four micro batches per stage to fill it (or as many as it can).
    """
    divisors = [size for size in range(1, per_rank + 1) if per_rank % size == 0]
    fitting = [size for size in divisors if size * seq_len <= MICRO_BATCH_TOKENS] or [1]
    if pipeline > 1:
        fitting = [size for size in fitting if per_rank // size >= 4 * pipeline] or [1]
    return fitting[-1]


def _home(key: str) -> str:
    homes = [dotted((*path, key)) for path, known in SECTIONS.items() if key in known]
    return f", did you mean {' or '.join(map(repr, homes))}?" if homes else ""


def _drop_auto(section: dict[str, Any]) -> None:
    for key in [key for key, value in section.items() if value == AUTO or value is None]:
        del section[key]
    for value in section.values():
        if isinstance(value, dict):
            _drop_auto(value)


def _batches(recipe: Recipe, resolved: dict[str, Any], layout: Layout, clashes: list[str]) -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    numbers = [resolved.get(name) for name in names]
    for name, number in zip(names, numbers, strict=True):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            clashes.append(f"{name} must be a positive whole number, got {number!r}")
            return
    whole, micro, accumulation = numbers
    target = recipe.batch.global_batch
    if target is not None and whole is not None and target != whole:
        clashes.append(f"batch.global is {target}, train_batch_size is {whole}")
    target = target or whole
    if target is None:
        if micro is None or accumulation is None:
            clashes.append("batch.global is missing: state the sequences of one step in the recipe")
            return
        target = micro * accumulation * layout.data
    if target % layout.data:
        unit = layout.data * (micro or 1)
        near = [str(value) for value in (target // unit * unit, -(-target // unit) * unit) if value]
        clashes.append(
            f"batch.global {target} cannot be shared by {layout.data} data-parallel ranks"
            + (f" in micro batches of {micro}" if micro else "")
            + f"; nearest: {' or '.join(near)}"
        )
        return
    per_rank = target // layout.data
    if micro is None and accumulation is not None and per_rank % accumulation == 0:
        micro = per_rank // accumulation
    micro = micro or default_micro_batch(per_rank, recipe.data.seq_len, layout.pipeline)
    if per_rank % micro:
        fits = ", ".join(str(size) for size in range(1, per_rank + 1) if per_rank % size == 0)
        clashes.append(
            f"train_micro_batch_size_per_gpu {micro} does not divide the {per_rank} sequences of a rank "
            f"(batch.global {target} / data parallel {layout.data}); micro batches that do: {fits}"
        )
        return
    if accumulation not in (None, per_rank // micro):
        clashes.append(
            f"gradient_accumulation_steps is {accumulation}, but batch.global {target} / (micro batch {micro} x data "
            f"parallel {layout.data}) is {per_rank // micro}; leave it out"
        )
    resolved.update(zip(names, (target, micro, per_rank // micro), strict=True))


def _optimizer(recipe: Recipe, resolved: dict[str, Any], clashes: list[str]) -> None:
    section = resolved.setdefault("optimizer", {})
    section.setdefault("type", "AdamW")
    params = section.setdefault("params", {})
    for key in ("lr", "betas", "eps", "weight_decay"):
        ours = getattr(recipe.optimizer, key)
        ours = list(ours) if isinstance(ours, tuple) else ours
        theirs = params.setdefault(key, ours)
        if key in recipe.optimizer.model_fields_set and theirs != ours:
            clashes.append(f"optimizer.{key} is {ours}, optimizer.params.{key} is {theirs}")
