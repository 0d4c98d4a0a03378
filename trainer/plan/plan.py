"""The plan of a run: what the recipe and the DeepSpeed JSON come to on a number of devices. Needs no torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...data_prep.errors import UserError
from ...data_prep.store import TokenStore
from ..adapters.base import rows_of
from ..adapters.registry import adapter_of
from ..data.samples import Packs, Samples, samples_of
from ..data.splits import Part, SplitName, open_split, whole_part
from ..data.vocabulary import vocabulary_of
from ..families.registry import family_of
from ..families.specs import parameter_table, trained_vocab
from ..objectives.registry import objective_of
from ..recipe.errors import explain
from ..recipe.precision import Precision
from ..recipe.recipe import Recipe
from ..recipe.sources import source_names
from ..sinks.registry import check_sink
from .deepspeed_json import fill_scheduler, reconcile
from .layout import Layout
from .legality import check, layout_of
from .memory import MemoryEstimate, estimate_memory
from .model_config import resolve_model
from .settings import BUCKET, Settings, read_settings
from .work import model_flops, uncounted

__all__ = ["Layout", "MemoryEstimate", "Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """Everything that follows from recipe, JSON and devices. Batches are in sequences."""

    recipe: Recipe  # with everything filled that the JSON states
    layout: Layout
    micro_batch: int  # of one data-parallel rank
    accumulation: int
    global_batch: int
    seq_len: int
    vocab_size: int
    padded_vocab_size: int
    model_config: dict[str, Any]
    samples: int  # in the train split: one epoch
    records: int  # in these samples; 0 where they are text
    filled: float  # share of the samples' places that hold something
    total_steps: int
    warmup_steps: int
    decay_steps: int
    settings: Settings  # of the resolved JSON
    parameters: int | None  # trained ones, vocabulary padded
    frozen: int  # parameters of the base of an adapter, as far as they are known
    memory: MemoryEstimate | None  # None where there is no parameter table for the family

    @property
    def token_flops(self) -> float | None:
        """Floating-point operations of training on a token; None where they cannot be counted."""
        return None if uncounted(self.model_config) else model_flops(self.model_config, self.seq_len)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources of a mixture, whose losses each step tells apart; of a single source, none."""
        train = self.recipe.data.train
        return source_names(train) if len(train) > 1 and objective_of(self.recipe.objective).per_token else ()

    @property
    def positions(self) -> int:
        """Sequence positions of the whole run: as many tokens are read, and trained unless they are masked."""
        return self.total_steps * self.global_batch * self.seq_len

    @property
    def deepspeed(self) -> dict[str, Any]:
        """The resolved JSON: no "auto", batch sizes and optimizer filled."""
        return dict(self.settings.json)

    @property
    def precision(self) -> Precision:
        return self.settings.precision


def make_plan(recipe: Recipe, ds: Mapping[str, Any], devices: int) -> Plan:
    """Opens the stores and works out the run.

    Raises:
        UserError: anything that cannot run, with the nearest alternatives.
    """
    check_names(recipe)
    stated = read_settings(ds)
    layout = layout_of(recipe, stated, devices)
    resolved = reconcile(recipe, stated, layout)
    parts = open_split(recipe.data, "train")
    check_stores(recipe, _stores(recipe, parts))
    model = resolve_model(recipe, *vocabulary_of(_stores(recipe, parts), recipe.tokenizer))
    check(recipe, read_settings(resolved), layout, model)
    global_batch = resolved["train_batch_size"]
    train = _train_samples(recipe, parts, global_batch)
    samples, packs = sum(map(len, train)), [own for own in train if isinstance(own, Packs)]
    total = _total_steps(recipe, samples, global_batch)
    warmup, decay = _schedule_steps(recipe, total)
    fill_scheduler(resolved, total, warmup)
    parameters, frozen = _parameters(recipe, model, layout)
    if parameters is not None and (layout.zero_stage > 0 or layout.pipeline > 1):
        # DeepSpeed allocates its bucket whole, 500 million elements unless told otherwise, however small the model is
        resolved["zero_optimization"].setdefault("reduce_bucket_size", min(BUCKET, parameters))
    settings = read_settings(resolved)
    return Plan(
        recipe=_resolved_recipe(recipe, settings),
        layout=layout,
        micro_batch=resolved["train_micro_batch_size_per_gpu"],
        accumulation=resolved["gradient_accumulation_steps"],
        global_batch=global_batch,
        seq_len=recipe.data.seq_len,
        vocab_size=model["vocab_size"],
        padded_vocab_size=trained_vocab(model, layout.tensor),
        model_config=model,
        samples=samples,
        records=sum(len(own.lengths) for own in packs),
        filled=sum(int(own.lengths.sum()) for own in packs) / (samples * recipe.data.seq_len) if packs else 1.0,
        total_steps=total,
        warmup_steps=warmup,
        decay_steps=decay,
        settings=settings,
        parameters=parameters,
        frozen=frozen,
        memory=None if parameters is None else _memory(recipe, settings, layout, model),
    )


def check_names(recipe: Recipe) -> None:
    """Refuses what the recipe names and no registry knows.

    Raises:
        UserError: with the nearest name.
    """
    objective_of(recipe.objective)
    adapter_of(recipe.adapter)
    for sink in recipe.log.sinks:
        check_sink(sink)
    check_tasks(recipe.eval.tasks)


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuses tasks that cannot be asked here.

    Raises:
        UserError: the harness is not installed, or a task file is missing.
    """
    if tasks and find_spec("lm_eval") is None:
        raise UserError(
            f"eval.tasks: needs lm-evaluation-harness, which {sys.executable} has not: pip install 'zeropipe[tasks]'"
        )
    for task in tasks:
        if task.endswith((".yaml", ".yml")) and not Path(task).is_file():
            raise UserError(f"eval.tasks {task}: no such file")


def check_stores(recipe: Recipe, stores: Sequence[TokenStore]) -> None:
    """Refuses stores that the objective does not learn from, and keys that mean nothing to those it does.

    Raises:
        UserError: with what to use instead.
    """
    reads = objective_of(recipe.objective).reads
    name = recipe.objective if isinstance(recipe.objective, str) else recipe.objective["type"]
    for store in stores:
        if store.kind != reads:
            held = {"text": "text", "sft": "records (sft)", "dpo": "preferences (dpo)"}[store.kind]
            remedy = f"objective={'causal_lm' if store.kind == 'text' else store.kind}"
            how = "" if reads == "text" else f", or a store that `zeropipe prepare --format {reads}` made"
            raise UserError(f"objective {name} does not learn from {store.path}, which holds {held}; use {remedy}{how}")
    if reads == "text":
        if recipe.data.packing is not None:
            raise UserError("data.packing is for records (objective sft or dpo); leave it out for text")
        return
    if recipe.data.document_mask:
        raise UserError("data.document_mask is for text: records never attend to each other; leave it out")
    if recipe.duration.tokens is not None:
        raise UserError("duration.tokens: rows of records hold fewer tokens than data.seq_len; state epochs or steps")


def _stores(recipe: Recipe, parts: Sequence[Part]) -> list[TokenStore]:
    """All stores of a run: those of the train split, those that validation and test have of their own, and eval's."""
    own: list[SplitName] = [split for split in ("valid", "test") if getattr(recipe.data, split)]
    held_out = [part for split in own for part in open_split(recipe.data, split)]
    sets = [whole_part(store) for stores in recipe.eval.sets.values() for store in stores]
    return [part.store for part in (*parts, *held_out, *sets)]


def _parameters(recipe: Recipe, model: Mapping[str, Any], layout: Layout) -> tuple[int | None, int]:
    """Trained and frozen ones."""
    if family_of(model) is None:
        return None, 0
    rows = rows_of(adapter_of(recipe.adapter))(parameter_table(model, layout.tensor))
    trained = sum(spec.numel for spec in rows if spec.trained)
    return trained, sum(spec.numel for spec in rows) - trained


def _memory(recipe: Recipe, settings: Settings, layout: Layout, model: Mapping[str, Any]) -> MemoryEstimate:
    if layout.pipeline > 1:  # the engine runs ZeRO-0 in a pipeline as ZeRO-1
        layout = replace(layout, zero_stage=max(1, layout.zero_stage))
    memory = estimate_memory(
        model,
        layout,
        settings,
        recipe.data.seq_len,
        recipe.parallel.partition,
        rows_of(adapter_of(recipe.adapter)),
        recipe.optimizer.embedding_rate,
        objective_of(recipe.objective).uniform,
        recipe.mlp_tile,
    )
    return memory if recipe.save.background else replace(memory, snapshot=0)


def _train_samples(recipe: Recipe, parts: Sequence[Part], global_batch: int) -> list[Samples]:
    """The samples of the train split, of which there must be enough for one global batch."""
    data = recipe.data
    if not parts:
        raise UserError(f"data.split {data.split}: leaves no document to train on")
    train = [samples_of(part, data.seq_len, data.document_mask, data.packing) for part in parts]
    sizes = list(map(len, train))
    if 0 in sizes:
        short = parts[sizes.index(0)].store.path
        raise UserError(f"{short}: its train split is shorter than one sample of {data.seq_len} + 1 tokens")
    if sum(sizes) < global_batch:
        raise UserError(
            f"the train split holds {sum(sizes)} samples of {data.seq_len} tokens, one global batch takes "
            f"{global_batch}; use batch.global={max(1, sum(sizes))} or less, a shorter data.seq_len, or more data"
        )
    return train


def _total_steps(recipe: Recipe, samples: int, global_batch: int) -> int:
    """Steps of the run; an epoch is as many samples as the train split holds, whatever the weights draw them from."""
    duration = recipe.duration
    if duration.steps is not None:
        return duration.steps
    if duration.tokens is not None:
        return math.ceil(duration.tokens / (global_batch * recipe.data.seq_len))
    epochs = duration.epochs or 0
    if (steps := int(epochs * samples) // global_batch) < 1:
        raise UserError(f"duration.epochs {epochs} is less than one step of {global_batch} sequences")
    return steps


def _schedule_steps(recipe: Recipe, total: int) -> tuple[int, int]:
    """Warm-up steps, and the steps in which the learning rate falls."""
    schedule = recipe.schedule
    warmup = _steps(schedule.warmup, total)
    decay = {"constant": 0, "wsd": _steps(schedule.decay, total)}.get(schedule.type, total - warmup)
    if warmup > total or warmup + decay > total:
        raise UserError(
            f"schedule: {warmup} warm-up steps"
            + (f" and {decay} steps of decay" if schedule.type == "wsd" else "")
            + f" do not fit into {total} steps; shorten them or train longer"
        )
    return warmup, decay


def _steps(amount: float, total: int) -> int:
    """Whole numbers are steps, fractions are of `total`, rounded to the nearest and at least one if not zero."""
    if isinstance(amount, int):
        return amount
    return max(1, round(amount * total)) if amount else 0


def _resolved_recipe(recipe: Recipe, settings: Settings) -> Recipe:
    params = settings.optimizer_params
    values = {key: getattr(recipe, key) for key in type(recipe).model_fields if key in recipe.model_fields_set}
    values["optimizer"] = {key: params[key] for key in settings.optimizer.keys if key in params}
    if recipe.optimizer.embedding_lr is not None:
        values["optimizer"]["embedding_lr"] = recipe.optimizer.embedding_lr
    values["batch"] = {"global": settings.global_batch}
    if settings.scheduler is None:
        values["schedule"] = recipe.schedule
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, Recipe, "recipe, with the values of the DeepSpeed JSON", {})) from None
