"""Takes a DeepSpeed checkpoint in: master weights and moments under Hugging Face's names, as a checkpoint of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...data_prep.errors import UserError, as_user_error
from ..checkpoint.boxes import Box, Shape
from ..checkpoint.files import STATE, box_tensor, write_json, write_rank
from ..checkpoint.folder import CHECKPOINTS, begin, clear_leftovers, ls, partial_path, publish
from ..checkpoint.reader import MASTER
from ..checkpoint.safetensors_writer import FileTensor
from ..families.registry import FAMILIES
from ..families.specs import parameter_table
from ..plan.settings import precision_of
from ..recipe.recipe import Recipe, load_recipe
from .deepspeed_checkpoint import DeepSpeedCheckpoint, open_deepspeed


@dataclass(frozen=True)
class Imported:
    """What was written, and what the user should know of it."""

    path: Path
    kind: str
    step: int
    parameters: int
    notes: list[str]


def import_checkpoint(
    source: str | Path,
    output: str | Path | None,
    recipe: str | None = None,
    config: str | Path | None = None,
    samples: int | None = None,
    trust: bool = False,
) -> Imported:
    """Writes `output/checkpoints/step-…` from a DeepSpeed checkpoint; memory is that of one parameter.

    Args:
        source: the folder given to DeepSpeed's `save_checkpoint`, a tag in it, or a universal folder.
        output: a run directory without checkpoints; None: the recipe's.
        recipe: of the run that will go on; with it the checkpoint can be resumed.
        config: a Hugging Face folder or config.json instead: weights and moments without a run.
        samples: of the recipe's data order that count as consumed; None: the step times the global batch.
        trust: the user vouches for the pickles.

    Raises:
        UserError: not trusted, another model's, incomplete, or the output has checkpoints already.
    """
    if (recipe is None) == (config is None):
        raise UserError("say either --recipe RECIPE (to go on training) or --config FOLDER_OR_JSON (the model alone)")
    loaded = load_recipe(recipe) if recipe is not None else None
    if samples is not None and samples < 0:
        raise UserError(f"--samples {samples}: expected 0 or more")
    if output is None and loaded is None:
        raise UserError("say --output RUN: the run directory to write")
    folder = Path(output if output is not None else loaded.output) / CHECKPOINTS  # type: ignore[union-attr]
    if ls(folder):
        raise UserError(f"{folder}: has checkpoints already; import into another --output, or remove them")
    found = open_deepspeed(source, trust)
    identity, notes = _identity(found, loaded, config, samples)
    shapes = model_shapes(identity["model_config"])
    names = match_names(found, shapes)
    state = {"step": found.step, "imported_from": str(found.path.absolute()), **identity, "engine": engine_state(found)}
    path = _write(folder, state, _tensors(found, names, shapes), shapes)
    return Imported(path, found.kind, found.step, len(names), notes)


def _identity(
    found: DeepSpeedCheckpoint, recipe: Recipe | None, config: str | Path | None, samples: int | None
) -> tuple[dict[str, Any], list[str]]:
    """What the checkpoint's state says of run and model, and what in it may surprise."""
    precision = {"precision": precision_of(found.states.get("ds_config") or {}).name}
    if recipe is None:
        return {**precision, "model_config": _model_config(Path(config or ""))}, [
            "imported without a recipe: it can be exported, evaluated and be another run's model.init, not resumed"
        ]
    from ..plan.plan import make_plan
    from ..run.data import RunData

    # any layout gives the same identity: the simplest that the recipe allows
    plan = make_plan(recipe, {"zero_optimization": {"stage": 1}}, recipe.parallel.pipeline)
    consumed = found.step * plan.global_batch if samples is None else samples
    identity = {
        **RunData.open(plan).identity(),
        **precision,
        "samples_consumed": consumed,
        "tokens_consumed": consumed * plan.seq_len,
    }
    return identity, _differences(found, plan.recipe, plan.total_steps)


def _differences(found: DeepSpeedCheckpoint, recipe: Recipe, total_steps: int) -> list[str]:
    """Hyperparameters that will not go on as they were."""
    notes = []
    for key in ("betas", "eps"):
        was = {str(list(value) if isinstance(value := group[key], tuple) else value) for group in found.groups}
        ours = getattr(recipe.optimizer, key)
        ours = str(list(ours) if isinstance(ours, tuple) else ours)
        if was - {ours}:
            notes.append(f"the optimizer had {key} {' and '.join(sorted(was))}; the recipe says {ours}")
    decays = sorted({group["weight_decay"] for group in found.groups})
    if decays and decays[-1] != recipe.optimizer.weight_decay:
        notes.append(f"weight decay was {decays[-1]}; the recipe says {recipe.optimizer.weight_decay}")
    if len(decays) == 1 and decays[0]:
        notes.append("weight decay applied to norms and biases too; from here on it applies to matrices only")
    if found.step >= total_steps:
        notes.append(f"the recipe ends after {total_steps} steps, and this is step {found.step}: nothing is left to do")
    return notes


def _model_config(path: Path) -> dict[str, Any]:
    """The configuration in a Hugging Face folder, or a JSON file."""
    from ..recipe.text_files import parse_json, read_text

    file = path / "config.json" if path.is_dir() else path
    config = parse_json(read_text(file), str(file))
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{file}: not a transformers configuration: model_type is missing")
    return config


def model_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Shape of every parameter by Hugging Face's name, tied ones once."""
    if config.get("model_type") in FAMILIES:
        return {spec.name: spec.shape for spec in parameter_table(config)}
    import torch

    from .load import build_plain

    with torch.device("meta"):
        model = build_plain(dict(config), "float32")
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def match_names(found: DeepSpeedCheckpoint, shapes: Mapping[str, Shape]) -> dict[str, str]:
    """The checkpoint's name of every parameter: Hugging Face's, behind what a wrapping module put before it.

    Raises:
        UserError: it holds other parameters than the model, or other shapes.
    """
    stored, wanted = set(found.names), sorted(shapes)
    prefixes = {name.removesuffix(wanted[0]) for name in stored if name.endswith(wanted[0])}
    fitting = [prefix for prefix in sorted(prefixes, key=len) if all(prefix + name in stored for name in wanted)]
    prefix = fitting[0] if fitting else ""
    names = {name: prefix + name for name in wanted}
    problems = [f"{name} is not in the checkpoint" for name in wanted if names[name] not in stored]
    problems += [f"{name} is not in the model" for name in sorted(stored - set(names.values()))]
    for name, theirs in names.items():
        shape = found.shapes.get(theirs)
        if shape is not None and shape != tuple(shapes[name]):
            problems.append(f"{name} is {list(shape)} in the checkpoint and {list(shapes[name])} in the model")
        if theirs in stored and MASTER not in found.kinds(theirs):
            problems.append(f"{name} has no fp32 weights in the checkpoint")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{found.path}: a checkpoint of another model: {'; '.join(problems[:5])}{more}")
    return names


def engine_state(found: DeepSpeedCheckpoint) -> dict[str, Any]:
    """What `read_scalars` of a live engine would have said.

    Weight decay, betas and eps stay as the recipe has them: DeepSpeed's groups have no names to go by.
    """
    states = found.states
    kinds = sorted({kind for kinds in found.runs.values() for kind in kinds} - {MASTER})
    rates = {group.get("lr") for group in found.groups}
    counters = {key: int(states.get(key) or 0) for key in ("global_steps", "global_samples", "skipped_steps")}
    return {
        "optimizer": "AdamW",
        "kinds": kinds,
        "scalars": {"step": float(found.step)} if kinds else {},
        "groups": [{"lr": rates.pop()}] * 2 if len(rates) == 1 else [],
        "counters": counters,
        "scheduler": states.get("lr_scheduler"),
        "loss_scaler": {},
        "autocast_scaler": None,
    }


def _tensors(found: DeepSpeedCheckpoint, names: Mapping[str, str], shapes: Mapping[str, Shape]) -> list[FileTensor]:
    def reader(theirs: str, kind: str, shape: Shape) -> Callable[[], Tensor]:
        return lambda: found.read(theirs, kind, shape)

    return [
        box_tensor(kind, name, Box.whole(shapes[name]), reader(theirs, kind, shapes[name]))
        for name, theirs in names.items()
        for kind in found.kinds(theirs)
    ]


def _write(folder: Path, state: Mapping[str, Any], tensors: list[FileTensor], shapes: Mapping[str, Shape]) -> Path:
    step = int(state["step"])
    partial = partial_path(folder, step)
    try:
        begin(folder, step)
        files = write_rank(partial, 0, tensors, shapes)
        files[STATE] = write_json(partial / STATE, state)
        return publish(folder, step, files)
    except OSError as error:
        raise as_user_error(error, "cannot write the checkpoint", folder) from error
    finally:
        clear_leftovers(folder)
