"""What a verb is about: which checkpoint, model, tokenizer, chat template."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...data_prep.errors import UserError
from ..recipe.text_files import read_text


def chosen_checkpoint(path: str, step: int | None) -> Path:
    """The checkpoint of a run at `step`; the path as it is where no step is asked for.

    Raises:
        UserError: there is none; names the steps that there are.
    """
    if not Path(path).exists():
        raise UserError(f"{path}: no such run, checkpoint or Hugging Face folder")
    if step is None:
        return Path(path)
    from ..checkpoint.folder import step_folders

    found = {folder.name: folder for folder in step_folders(path)}
    name = f"step-{step:08d}"
    if name not in found:
        steps = ", ".join(str(int(known.partition("-")[2])) for known in sorted(found))
        raise UserError(f"{path}: no checkpoint at step {step}; there are {steps or 'none'}")
    return found[name]


def load_chosen(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model that text is asked of, on its device, and its tokenizer: for verbs with `add_model_arguments` and
    `add_chat_arguments`. In float32 on a CPU unless `--dtype` says otherwise.
    """
    from ..export.adapted import load_model_or_adapter
    from ..export.load import load_tokenizer, pick_device

    device = pick_device(args.device)
    dtype = args.dtype or ("float32" if device.type == "cpu" else None)
    model, tokenizer = load_model_or_adapter(chosen_checkpoint(args.model, args.checkpoint), dtype, args.base)
    return model.to(device), tokenizer if args.tokenizer is None else load_tokenizer(args.tokenizer)


def chat_template_of(file: Path | None) -> str | None:
    """The template that `--chat-template` names. UserError if it cannot be read."""
    return None if file is None else read_text(file)
