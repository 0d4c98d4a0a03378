"""Whether an exported folder is what was written, and what the run that it is said to come from gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...data_prep.errors import UserError
from ..adapters.merged import MergedWeights
from ..checkpoint.folder import CHECKPOINTS
from ..checkpoint.reader import Checkpoint
from ..checkpoint.sharing import problems_of
from .huggingface import verify_weights
from .load import torch_dtype
from .provenance import folder_problems, read_provenance, run_problems
from .published import PublishedWeights


def export_problems(folder: Path, run: Path | None) -> Iterator[str]:
    """Everything that is wrong with an exported folder, one line each; reads all of it.

    Args:
        run: compare it with this run, too: configuration, every byte of its data, tokenizer, checkpoints, record; and
            every weight with the checkpoint, bit for bit.

    Raises:
        UserError: the folder was not exported by this program, or is damaged where it says what it holds; the run's
            files cannot be read.
    """
    facts = read_provenance(folder)
    problems = folder_problems(folder, facts)
    if run is not None:
        problems += run_problems(run, facts)
        kept = [run / CHECKPOINTS / name for name in facts["checkpoints"]]
        problems += [problem for path in kept if path.is_dir() for problem in problems_of(path)]
    yield from problems
    if run is None or problems:
        return
    path = run / CHECKPOINTS / facts["checkpoint"]
    how = facts["export"]
    try:
        checkpoint = Checkpoint.open(path)
        weights = PublishedWeights(MergedWeights(checkpoint, None, how["merge_onto"]), checkpoint.state["model_config"])
        verify_weights(weights, folder, torch_dtype(how["dtype"]))
    except UserError as error:
        yield f"{folder}: its weights are not those of {path}: {error}"
