"""Reading a run directory from outside: its recipe, tokenizer and precision, from the run or any checkpoint in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...data_prep.errors import UserError
from ...data_prep.store import TokenStore
from ..plan.settings import precision_of
from ..recipe.precision import PRECISIONS, Precision
from ..recipe.recipe import Recipe, load_recipe
from ..recipe.sources import WeightedStore


def is_hf_folder(path: Path) -> bool:
    """Whether `path` is a Hugging Face model folder, not a run of ours."""
    return (path / "config.json").is_file()


def run_directory(path: str | Path) -> Path | None:
    """The run that `path` (a run directory, its checkpoints/, or one of them) belongs to; None where there is none."""
    path = Path(path).absolute()
    return next((p for p in (path, *list(path.parents)[:2]) if (p / "recipe.yaml").is_file()), None)


def load_run_recipe(run: Path) -> Recipe:
    """The recipe of a run, its stores, tokenizer and initial model found from here.

    Relative paths are meant from the directory in which the run was started; that one is recorded, so that a run can be
    evaluated from anywhere.
    """
    recipe = load_recipe(str(run / "recipe.yaml"))
    started_in = _started_in(run)

    def found(path: str) -> str:
        return path if started_in is None or Path(path).exists() else str(started_in / path)

    def sources(listed: list[WeightedStore] | None) -> list[WeightedStore] | None:
        return listed and [source.model_copy(update={"store": found(source.store)}) for source in listed]

    data = recipe.data
    moved = {key: sources(getattr(data, key)) for key in ("train", "valid", "test")}
    tokenizer, init = recipe.tokenizer and found(recipe.tokenizer), recipe.model.init
    model = recipe.model.model_copy(update={"init": init if init == "random" else found(init)})
    sets = {name: sources(listed) for name, listed in recipe.eval.sets.items()}
    return recipe.model_copy(
        update={
            "model": model,
            "data": data.model_copy(update=moved),
            "eval": recipe.eval.model_copy(update={"sets": sets}),
            "tokenizer": tokenizer,
        }
    )


def _started_in(run: Path) -> Path | None:
    try:
        return Path(json.loads((run / "environment.json").read_text())["directory"])
    except (OSError, ValueError, KeyError):  # a run that was copied without it: paths are taken from here
        return None


def tokenizer_folder(path: str | Path) -> Path | None:
    """The Hugging Face tokenizer folder of a run, one of its checkpoints, or a model folder; None if there is none."""
    path = Path(path)
    if any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        return path
    run = run_directory(path)
    if run is None:
        return None
    recipe = load_run_recipe(run)
    if recipe.tokenizer is not None:
        return Path(recipe.tokenizer)
    try:
        return TokenStore.open(recipe.data.train[0].store).tokenizer
    except UserError:  # the store has moved away; the model itself can still be read
        return None


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer, in a folder that may hold a model too."""

    def is_models(name: str) -> bool:
        return name in ("config.json", "generation_config.json", "provenance.json") or "safetensors" in name

    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and file.suffix in (".json", ".txt", ".model", ".jinja") and not is_models(file.name)
    ]


def run_precision(path: str | Path, state: dict[str, Any]) -> Precision:
    """What a checkpoint's run computed with: from `state["precision"]`, else from the run's DeepSpeed JSON."""
    if "precision" in state:
        return PRECISIONS[state["precision"]]
    run = run_directory(path)
    config = json.loads((run / "deepspeed.json").read_text()) if run else {}
    return precision_of(config)
