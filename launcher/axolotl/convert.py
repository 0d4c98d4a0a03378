"""The whole of an Axolotl file at once."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ...data_prep.errors import UserError
from ...trainer.objectives.registry import objective_of
from ...trainer.plan.settings import read_settings
from ...trainer.recipe.errors import explain
from ...trainer.recipe.recipe import Recipe
from ...trainer.recipe.text_files import parse_yaml, read_text, yaml_lines
from . import training
from .data import read_data
from .deepspeed import read_deepspeed
from .reasons import REASONS
from .stated import Notes, Stated


def convert(config: Path, output: Path, devices: int) -> tuple[dict[str, str], list[list[str]], Notes]:
    """The files to write into `output`, the commands to run, and what became of the other keys.

    Raises:
        UserError: no YAML, a value of the wrong kind, or a method that there is none of here; names file, line and key.
    """
    text, notes = read_text(config), Notes()
    values = parse_yaml(text, str(config))
    if not isinstance(values, dict):
        raise UserError(f"{config}: an Axolotl file is a mapping of keys; got {type(values).__name__}")
    stated = Stated(values, str(config), yaml_lines(text), notes)
    name = config.stem
    objective = training.read_objective(stated)
    model = training.read_model(stated)
    data = read_data(stated, "dpo" if objective else None, name, output)
    micro, whole = training.read_batch(stated, devices)
    adapter = training.read_adapter(stated)
    optimizer = training.read_optimizer(stated, adapter)
    recipe: dict[str, Any] = {
        "name": name,
        "seed": stated.whole("seed", 42),  # Axolotl's own default
        "output": stated.text("output_dir", f"runs/{name}"),
        "model": model,
        "data": data.recipe,
        "objective": objective or training.learnt_from(data.kind, stated),
        "adapter": adapter,
        "batch": {"global": whole},
        "duration": training.read_duration(stated),
        "optimizer": optimizer,
        "schedule": training.read_schedule(stated, optimizer["lr"]),
        **training.read_cadence(stated, data.recipe.get("split") != "1"),
    }
    _check(recipe, config)
    ds = read_deepspeed(stated, micro, config.parent)
    read_settings(ds, f"{config}: the DeepSpeed JSON that comes of it")
    stated.leave_rest(REASONS, "unknown to this import", iter(REASONS))
    pair = [
        str(output / "recipe.yaml"),
        "--deepspeed_config",
        str(output / "deepspeed.json"),
        "--devices",
        str(devices),
    ]
    commands = [*data.commands, ["zeropipe", "plan", *pair], ["zeropipe", "launch", *pair]]
    head = [f"# From {config.name}, an Axolotl file.", *(f"#   {shlex.join(command)}" for command in commands)]
    files = {
        "recipe.yaml": "\n".join(head) + "\n" + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        "deepspeed.json": json.dumps(ds, indent=2) + "\n",
        **data.files,
    }
    return files, commands, notes


def _check(recipe: dict[str, Any], config: Path) -> None:
    """Refuses what no recipe may say: a rate of 0, for instance."""
    source = f"{config}: the recipe that comes of it"
    try:
        objective_of(Recipe.model_validate(recipe).objective)
    except ValidationError as error:
        raise UserError(explain(error, Recipe, source, {})) from None
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
