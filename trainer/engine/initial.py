"""Where the weights of step 0 come from."""

from __future__ import annotations

from pathlib import Path

from ..adapters.merged import MergedWeights
from ..checkpoint.reader import Checkpoint
from ..modeling.build import FolderValues, Values


def initial_values(init: str) -> Values | None:
    """The values of `model.init`: None (random), a Hugging Face folder's, or those of a run's newest checkpoint.

    Raises:
        UserError: nothing there to read, or it is damaged.
    """
    if init == "random":
        return None
    folder = Path(init)
    if (folder / "config.json").is_file():
        return FolderValues(folder)
    weights = MergedWeights(Checkpoint.open(folder))
    return lambda spec: weights.read(spec.name)
