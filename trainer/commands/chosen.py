"""Which checkpoint a verb is about."""

from __future__ import annotations

from pathlib import Path

from ...data_prep.errors import UserError


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
