"""What a model is evaluated on where nobody says more: the held-out data of its run, or a store."""

from __future__ import annotations

from pathlib import Path

from ...data_prep.errors import UserError
from ..checkpoint.reader import Checkpoint
from ..run.directory import is_hf_folder, load_run_recipe, run_directory, tokenizer_folder
from .evaluate import HeldOutData, run_data, store_data


def held_out_data(source: Path, split: str, store: str | None, seq_len: int | None) -> HeldOutData:
    """The data of a model.

    Args:
        source: a run directory, a checkpoint, or a Hugging Face folder.
        split: of the run's data.
        store: this whole store instead; needed for a Hugging Face folder that lies in no run.
        seq_len: with `store`; None: the run's, or the model's context.

    Raises:
        UserError: there is none.
    """
    tokenizer, run = tokenizer_folder(source), run_directory(source)
    if is_hf_folder(source):
        if store is not None:
            return store_data(store, seq_len or _context(source), tokenizer)
        if run is None:
            raise UserError(f"{source}: a Hugging Face folder has no data of its own; name a token store with --store")
        recipe = load_run_recipe(run)  # of the run that it was exported from
        return run_data(recipe, split, tokenizer, recipe.batch.global_batch or 8)
    if store is not None:
        recipe = load_run_recipe(run) if run else None
        length: int = seq_len or Checkpoint.open(source, verify=False).state["seq_len"]
        return store_data(store, length, tokenizer, recipe)
    if run is None:
        raise UserError(f"{source}: this checkpoint lies in no run directory; name a token store with --store")
    state = Checkpoint.open(source, verify=False).state
    return run_data(load_run_recipe(run), split, tokenizer, state["global_batch"])


def _context(folder: Path) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return min(1024, config.max_position_embeddings)
