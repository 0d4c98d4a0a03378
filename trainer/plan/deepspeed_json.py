"""The DeepSpeed JSON: read from its file, and reconciled with the recipe into one that DeepSpeed takes as it is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from ...data_prep.errors import UserError
from ..recipe.overrides import apply_override
from ..recipe.recipe import Recipe, load_recipe
from ..recipe.text_files import parse_json, read_named
from .layout import Layout
from .settings import AUTO, Settings, read_settings, section_of

MICRO_BATCH = 4
MICRO_BATCH_TOKENS = 4096
SCHEDULER_AUTO = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")
OVERRIDE = "ds."


def load_pair(recipe: str, ds: str, overrides: Sequence[str] = ()) -> tuple[Recipe, dict[str, Any]]:
    """The two files of a run, or shipped ones by their names; overrides that begin with `ds.` are the JSON's.

    Raises:
        UserError: as `load_recipe` and `load_ds_config`.
    """
    ours = [override.removeprefix(OVERRIDE) for override in overrides if override.startswith(OVERRIDE)]
    return load_recipe(recipe, [o for o in overrides if not o.startswith(OVERRIDE)]), load_ds_config(ds, ours)


def load_ds_config(path_or_name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a DeepSpeed JSON, or a shipped one by its name ("zero2"), and applies `section.key=value` overrides.

    Raises:
        UserError: not JSON, or anything that `read_settings` refuses; one line lists it all.
    """
    text, source = read_named(path_or_name, "ds_configs", ".json")
    ds = parse_json(text, source)
    if not isinstance(ds, dict):
        raise UserError(f"{source}: a DeepSpeed configuration is a JSON object; got {type(ds).__name__}")
    for override in overrides:
        apply_override(ds, override, {}, "the DeepSpeed JSON")
    read_settings(ds, source)
    return ds


def reconcile(recipe: Recipe, stated: Settings, layout: Layout) -> dict[str, Any]:
    """The JSON with everything that is absent or "auto" filled from the recipe and the layout.

    What is stated in one of the two wins; what is stated in both must agree.

    Raises:
        UserError: one line that lists every mismatch.
    """
    clashes: list[str] = []
    resolved = copy.deepcopy(dict(stated.json))
    resolved |= _batches(recipe, stated, layout, clashes)
    _optimizer(recipe, stated, resolved, clashes)
    if stated.scheduler is not None and "schedule" in recipe.model_fields_set:
        clashes.append("schedule: the recipe has a schedule and the JSON has scheduler; keep one")
    if stated.pipeline_stages not in (None, recipe.parallel.pipeline):
        clashes.append(f"parallel.pipeline is {recipe.parallel.pipeline}, pipeline.stages is {stated.pipeline_stages}")
    if clashes:
        raise UserError("recipe and DeepSpeed JSON do not agree: " + "; ".join(clashes))
    whole = stated.optimizer.elementwise or "gradient_clipping" in stated.json
    resolved["gradient_clipping"] = stated.clipping if whole else 0.0  # DeepSpeed's default since 0.19 too, spelled out
    if stated.precision.autocast:
        resolved["torch_autocast"].setdefault("dtype", "bfloat16")  # without it DeepSpeed stops at the first forward
    needed = stated.optimizer.zero_options.get(layout.zero_stage, {})
    resolved["zero_optimization"] = {**needed, **resolved.get("zero_optimization", {}), "stage": layout.zero_stage}
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
    """The micro batch where nobody states one: the largest divisor of a rank's share of the global batch up to 4 that
    keeps within 4,096 tokens and, with a pipeline, leaves four micro batches per stage to fill it (or as many as it
    can).
    """
    divisors = [size for size in range(1, MICRO_BATCH + 1) if per_rank % size == 0]
    fitting = [size for size in divisors if size * seq_len <= MICRO_BATCH_TOKENS] or [1]
    if pipeline > 1:
        fitting = [size for size in fitting if per_rank // size >= 4 * pipeline] or [1]
    return fitting[-1]


def _batches(recipe: Recipe, stated: Settings, layout: Layout, clashes: list[str]) -> dict[str, int]:
    """The three numbers of DeepSpeed's; none where they clash."""
    target, whole = recipe.batch.global_batch, stated.global_batch
    micro, accumulation = stated.micro_batch, stated.accumulation
    if target is not None and whole is not None and target != whole:
        clashes.append(f"batch.global is {target}, train_batch_size is {whole}")
    target = target or whole
    if target is None:
        if micro is None or accumulation is None:
            clashes.append("batch.global is missing: state the sequences of one step in the recipe")
            return {}
        target = micro * accumulation * layout.data
    if target % layout.data:
        unit = layout.data * (micro or 1)
        near = [str(value) for value in (target // unit * unit, -(-target // unit) * unit) if value]
        clashes.append(
            f"batch.global {target} cannot be shared by {layout.data} data-parallel ranks"
            + (f" in micro batches of {micro}" if micro else "")
            + f"; nearest: {' or '.join(near)}"
        )
        return {}
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
        return {}
    if accumulation not in (None, per_rank // micro):
        clashes.append(
            f"gradient_accumulation_steps is {accumulation}, but batch.global {target} / (micro batch {micro} x data "
            f"parallel {layout.data}) is {per_rank // micro}; leave it out"
        )
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return dict(zip(names, (target, micro, per_rank // micro), strict=True))


def _optimizer(recipe: Recipe, stated: Settings, resolved: dict[str, Any], clashes: list[str]) -> None:
    params = dict(stated.optimizer_params)
    for key in type(recipe.optimizer).model_fields:
        if key == "embedding_lr":  # DeepSpeed knows it only as the rate of a group, which the engine sets
            continue
        ours = getattr(recipe.optimizer, key)
        ours = list(ours) if isinstance(ours, tuple) else ours
        if key not in stated.optimizer.keys:
            if key in recipe.optimizer.model_fields_set:
                clashes.append(f"optimizer.{key}: {stated.optimizer_type} takes none; leave it out")
            continue
        if ours is None:  # what follows from another key stays out, unless the JSON states it
            continue
        theirs = params.setdefault(key, ours)
        if key in recipe.optimizer.model_fields_set and theirs != ours:
            clashes.append(f"optimizer.{key} is {ours}, optimizer.params.{key} is {theirs}")
    resolved["optimizer"] = {"type": stated.optimizer_type, **resolved.get("optimizer", {}), "params": params}
    if stated.optimizer.build is not None:  # DeepSpeed takes those of others with ZeRO only when told to
        resolved["zero_allow_untested_optimizer"] = True
