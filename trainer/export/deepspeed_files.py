"""The files of DeepSpeed's checkpoints: finding and opening them. Names are those of DeepSpeed 0.19."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ...data_prep.errors import UserError

_MODEL_FILES = "*mp_rank_*_model_states.pt"
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt")


def find_tag(path: Path) -> Path:
    """The folder that holds the files, from it or from the one above with its `latest`."""
    if _holds_checkpoint(path):
        return path
    for pointer in ("latest", "latest_universal"):
        if (path / pointer).is_file():
            tag = path / (path / pointer).read_text().strip()
            if _holds_checkpoint(tag):
                return tag
            raise UserError(
                f"{path / pointer}: names {tag.name!r}, which holds no DeepSpeed checkpoint; name another tag"
            )
    raise UserError(
        f"{path}: no DeepSpeed checkpoint here; expected a folder with *_model_states.pt or zero/, or one with `latest`"
    )


def _holds_checkpoint(path: Path) -> bool:
    return any(path.glob("*_model_states.pt")) or (path / "zero").is_dir()


def load_pickle(path: Path) -> Any:
    """Unpickles a file whose tensors stay on the disk until they are used.

    Raises:
        UserError: it is damaged, or needs a module that is not installed.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ImportError, AttributeError) as error:
        text = str(error).strip().partition("\n")[0]
        raise UserError(f"{path}: cannot be read: {type(error).__name__}: {text}") from error


def refuse_split_models(folder: Path) -> None:
    """UserError on checkpoints of pipelines, tensor-parallel ranks and experts, with what to do instead."""
    how = "convert it with `python -m deepspeed.checkpoint.ds_to_universal` and import the universal folder"
    if layers := sorted(folder.glob("layer_*-model_states.pt")):
        raise UserError(f"{folder}: a pipeline's checkpoint ({layers[0].name}): {how}")
    ranks = {name[1] for file in model_files(folder) if (name := re.search(r"mp_rank_(\d+)", file.name))}
    if len(ranks) > 1:
        raise UserError(f"{folder}: written by {len(ranks)} tensor-parallel ranks: {how}")
    if any(folder.glob("*expert_*")):
        raise UserError(f"{folder}: a mixture of experts; there is no such model here")


def model_files(folder: Path) -> list[Path]:
    """The files of the module's own states, in rank order."""
    return sorted(folder.glob(_MODEL_FILES), key=_rank)


def _rank(path: Path) -> int:
    """Data-parallel rank in a file's name: numbers, so that rank 10 does not precede rank 2."""
    found = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(found[1]) if found else 0


def optimizer_files(folder: Path) -> list[Path]:
    """The files of the optimizer's states, in rank order; none without ZeRO."""
    return sorted((file for file in folder.iterdir() if _OPTIMIZER_FILE.fullmatch(file.name)), key=_rank)


def first_optimizer_state(folder: Path) -> dict[str, Any]:
    """The first rank's, for what all ranks hold alike."""
    return load_pickle(optimizer_files(folder)[0])["optimizer_state_dict"]


def optimizer_states(folder: Path, states: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every rank's optimizer state, in rank order.

    Raises:
        UserError: a rank's file is missing.
    """
    files = optimizer_files(folder)
    missing = sorted(set(range(states["dp_world_size"])) - {_rank(file) for file in files})
    if missing:
        raise UserError(f"{folder}: the optimizer states of ranks {missing} of {states['dp_world_size']} are missing")
    for file in files:
        yield load_pickle(file)["optimizer_state_dict"]
