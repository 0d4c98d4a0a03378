"""A model with a peft adapter on it, from the adapter's folder and its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ...data_prep.errors import UserError
from .load import load_model, load_tokenizer

_CONFIG = "adapter_config.json"


def load_model_or_adapter(
    path: str | Path, dtype: str | torch.dtype | None, base: str | Path | None
) -> tuple[Any, Any]:
    """`load_model`, and a folder with a peft adapter as well, put on its base by peft, not folded in.

    Args:
        base: of an adapter: anything that `load_model` takes; None: what its adapter_config.json names.

    Raises:
        UserError: also if the base is not there, or the adapter does not fit it.
    """
    path = Path(path)
    if not (path / _CONFIG).is_file():
        return load_model(path, dtype, base)
    if not (path / "adapter_model.safetensors").is_file():
        raise UserError(f"{path}: no adapter_model.safetensors there; pickled adapters are refused")
    folder = _base_of(path, base)
    model, tokenizer = load_model(folder, dtype)
    return _adapted(model, path, folder).eval(), load_tokenizer(path) or tokenizer


def _base_of(adapter: Path, stated: str | Path | None) -> Path:
    if stated is not None:
        if not Path(stated).exists():
            raise UserError(f"--base {stated}: no such run, checkpoint or Hugging Face folder")
        return Path(stated)
    file = adapter / _CONFIG
    try:
        named = json.loads(file.read_text("utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    if not named:
        raise UserError(f"{file}: names no base model (base_model_name_or_path); give its folder with --base")
    for place in (Path(named), adapter / named):
        if place.exists():
            return place
    raise UserError(f"{file}: its base model {named!r} is not a folder here; give its folder with --base")


def _adapted(model: Any, adapter: Path, base: Path) -> Any:
    from peft import PeftModel

    try:
        adapted: Any = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
        # once more for what came of it, which the first call does not tell
        outcome: Any = adapted.load_adapter(str(adapter), "default", torch_device="cpu")
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{adapter}: this adapter does not fit the base {base}: {problem[:400]}") from None
    if wrong := [*outcome.missing_keys, *outcome.unexpected_keys]:
        raise UserError(
            f"{adapter}: this adapter does not fit the base {base}: {len(wrong)} parameters have no counterpart, such "
            f"as {wrong[0]}"
        )
    return adapted
