"""What makes a run this run, and no other: a checkpoint records it, and a resume compares it."""

from __future__ import annotations

from typing import Any

from ..data.batches import open_windows
from ..plan.plan import Plan
from ..recipe.recipe import Recipe


def run_identity(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """What must not change when a run is resumed: with another value, the rest of the run would be another run."""
    windows = open_windows(recipe, "train")
    return {
        "data": [window.fingerprint for window in windows],
        "weights": [window.part.weight for window in windows],
        "seed": recipe.seed,
        "seq_len": plan.seq_len,
        "global_batch": plan.global_batch,
        "document_mask": recipe.data.document_mask,
        "model_config": plan.model_config,
    }
