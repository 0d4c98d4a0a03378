"""Checkpoints that know no layout: saved from any engine, loaded into any other, read without one.

For every Hugging Face parameter a checkpoint holds the fp32 master weight and the optimizer's moments, in boxes
(`boxes.py`) that whoever held them wrote. Saving moves no tensor between ranks; loading reads what a rank needs.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import Parameter

from ...data_prep.errors import UserError
from ..ranks.ranks import Ranks
from .deepspeed_state import Shard, create_state, read_scalars, refresh_model, shards, write_scalars
from .files import (
    PROBE,
    STATE,
    Digest,
    Entry,
    write_bytes,
    write_json,
    write_pieces,
)
from .folder import (
    CHECKPOINTS,
    begin,
    check_same_run,
    ls,
    partial_path,
    problems_of,
    prune,
    publish,
    step_folders,
    step_name,
    tidy,
    verify,
)
from .reader import Checkpoint
from .regions import Box, pieces, written_pieces

__all__ = ["Checkpoint", "check_same_run", "load", "ls", "prune", "resolve_resume", "save", "verify"]

T = TypeVar("T")
NamedParameters = Sequence[tuple[str, Parameter]]


def save(
    engine: Any,
    parameters: NamedParameters,
    ranks: Ranks,
    output: Path,
    state: Mapping[str, Any],
    keep: int | None = None,
    probe: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes `output/checkpoints/step-…`, which appears whole or not at all. Collective over all ranks.

    Args:
        engine: DeepSpeed's engine, between two steps.
        parameters: (Hugging Face name, parameter with `.spec`), tied ones once; the same on all ranks of a
            pipeline stage.
        state: JSON of the trainer (rank 0's counts), with `step`.
        keep: how many checkpoints stay; None keeps all.
        probe: tensors of rank 0 to store beside it.

    Raises:
        UserError: on every rank, if one of them could not write; older checkpoints are then as they were.
    """
    folder, step = Path(output) / CHECKPOINTS, int(state["step"])
    partial = partial_path(folder, step)
    complete = dict(state) | {"engine": read_scalars(engine)}
    try:
        _together(ranks, folder, lambda: begin(folder, step) if ranks.is_main else None)
        held = shards(engine, parameters, ranks)
        entries = _entries(held, ranks, _written_elsewhere(held, ranks))
        shapes = {shard.name: shard.spec.shape for shard in held}
        written = _together(ranks, folder, lambda: write_pieces(partial, ranks.rank, entries, shapes))
        files = {name: digest for of_rank in ranks.gather_objects(written) for name, digest in of_rank.items()}
        _together(ranks, folder, lambda: _finish(folder, step, files, complete, probe) if ranks.is_main else None)
        _together(ranks, folder, lambda: prune(folder, keep) if ranks.is_main and keep is not None else [])
    except UserError:
        if ranks.is_main:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                tidy(folder)
        raise
    return folder / step_name(step)


def _finish(
    folder: Path, step: int, files: dict[str, Digest], state: Mapping[str, Any], probe: Mapping[str, Tensor] | None
) -> None:
    """What rank 0 adds when all have written."""
    partial = partial_path(folder, step)
    files[STATE] = write_json(partial / STATE, state)
    if probe is not None:
        files[PROBE] = write_bytes(partial / PROBE, safetensors.torch.save(dict(probe)))
    publish(folder, step, files)


def _together(ranks: Ranks, path: Path, action: Callable[[], T]) -> T:
    """Runs `action` on every rank; where one cannot write, all raise the same error instead of waiting for it."""
    result, problem = None, None
    try:
        result = action()
    except OSError as error:
        problem = f"{error.filename or path}: cannot write the checkpoint: {error.strerror or error}"
    except UserError as error:
        problem = str(error)
    found = [(rank, text) for rank, text in enumerate(ranks.gather_objects(problem)) if text is not None]
    if found:
        where = f" (rank {found[0][0]})" if ranks.world > 1 else ""
        raise UserError(f"{found[0][1]}{where}; older checkpoints are untouched. Free some space or check the folder")
    return result  # type: ignore[return-value]


def _written_elsewhere(held: Sequence[Shard], ranks: Ranks) -> set[str]:
    """Parameters that an earlier pipeline stage holds too (tied embeddings), and writes."""
    if ranks.pipeline_size == 1:
        return set()
    stages = ranks.gather_objects((ranks.pipeline, [shard.name for shard in held]))
    return {name for stage, names in stages if stage < ranks.pipeline for name in names}


def _entries(held: Sequence[Shard], ranks: Ranks, skip: set[str]) -> list[Entry]:
    """The boxes that this rank writes: its part of what several ranks hold alike."""
    entries = []
    for shard in held:
        if shard.name in skip:
            continue
        place = (ranks.tensor, ranks.tensor_size, shard.start, shard.stop, shard.replica, shard.replicas)
        for piece in written_pieces(shard.spec, *place):
            for kind in shard.views:
                entries.append(Entry(kind, shard.name, piece.box, _reader(shard, kind, piece.local)))
    return entries


def _reader(shard: Shard, kind: str, local: Box) -> Callable[[], Tensor]:
    return lambda: shard.view(kind, local).to("cpu", torch.float32).contiguous()


@torch.no_grad()
def load(engine: Any, parameters: NamedParameters, ranks: Ranks, path: Path, verify: bool = True) -> dict[str, Any]:
    """Puts a checkpoint into a live engine of any layout and returns the state that was saved with it. Collective.

    Args:
        engine, parameters: as for `save`.
        path: a checkpoint, as `resolve_resume` gives it.
        verify: compare every byte with the manifest before anything is loaded; `resolve_resume` has done so.

    Raises:
        UserError: on every rank: the checkpoint is damaged, or of another model.
    """
    problems = _shared_problems(Path(path), ranks) if verify else []
    if problems:
        raise UserError(f"damaged checkpoint: {'; '.join(problems)}. Restore it, or resume from an older one")
    checkpoint = Checkpoint(Path(path))
    saved = checkpoint.state["engine"]
    _check_model(checkpoint, parameters, ranks)
    create_state(engine, saved["kinds"], saved["scalars"])
    held = shards(engine, parameters, ranks)
    for shard in held:
        _fill(checkpoint, shard, ranks)
    refresh_model(engine, held)
    write_scalars(engine, saved)
    return checkpoint.state


def _fill(checkpoint: Checkpoint, shard: Shard, ranks: Ranks) -> None:
    stored = set(checkpoint.kinds(shard.name))
    own = pieces(shard.spec, ranks.tensor, ranks.tensor_size, shard.start, shard.stop)
    for kind, view in shard.views.items():
        if sum(piece.box.numel for piece in own) < view.numel() or kind not in stored:
            view.zero_()  # padded vocabulary rows; moments of what was frozen when it was saved
        if kind not in stored:
            continue
        for piece in own:

            def target(box: Box, kind: str = kind, box_of: Box = piece.box, at: Box = piece.local) -> Tensor:
                return shard.view(kind, box.moved(box_of.offset, at.offset))

            checkpoint.read_into(shard.name, kind, piece.box, target)


def _check_model(checkpoint: Checkpoint, parameters: NamedParameters, ranks: Ranks) -> None:
    """Refuses a checkpoint of another model, before anything is touched."""
    mine = {name: p.spec.shape for name, p in parameters}  # type: ignore[attr-defined]
    gathered = ranks.gather_objects(list(mine)) if ranks.pipeline_size > 1 else [list(mine)]
    live, stored = {name for names in gathered for name in names}, set(checkpoint.names())
    problems = [f"{name} is not in the checkpoint" for name in sorted(live - stored)]
    problems += [f"{name} is not in the model" for name in sorted(stored - live)]
    problems += [
        f"{name} is {list(checkpoint.shape(name))} in the checkpoint and {list(shape)} in the model"
        for name, shape in sorted(mine.items())
        if name in stored and checkpoint.shape(name) != tuple(shape)
    ]
    if not ranks.all_true(not problems):
        listed = "; ".join(problems[:5]) or "another rank's parameters differ"
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{checkpoint.path}: a checkpoint of another model: {listed}{more}")


def _shared_problems(path: Path, ranks: Ranks) -> list[str]:
    """What is wrong with a checkpoint; the ranks share the reading and all get the same answer. Collective."""
    try:
        problems, refusal = problems_of(path, ranks.rank, ranks.world), None
    except UserError as error:
        problems, refusal = [], str(error)
    gathered = ranks.gather_objects((problems, refusal))
    for _, text in gathered:
        if text is not None:
            raise UserError(text)
    return list(dict.fromkeys(text for texts, _ in gathered for text in texts))


def resolve_resume(output: Path, resume: str, ranks: Ranks) -> Path | None:
    """The checkpoint to resume from, every byte of it verified; None for a fresh start. Collective.

    Args:
        output: the run directory.
        resume: `auto` (newest whole one of the run directory, if it has any), `never`, or a path to a checkpoint, a
            `checkpoints/` folder or a run directory.

    Raises:
        UserError: there are checkpoints but none is whole, or the path holds none.
    """
    if resume == "never":
        return None
    root = Path(output) if resume == "auto" else Path(resume)
    if ranks.is_main and resume == "auto":  # this run's own; another's may be alive
        tidy(root / CHECKPOINTS)
    candidates: list[Path] = ranks.gather_objects(step_folders(root) if ranks.is_main else None)[0]
    if not candidates and resume != "auto":
        raise UserError(f"resume: {root} holds no checkpoint (expected a run directory or a step-… folder)")
    damaged: list[str] = []
    for path in candidates:
        problems = _shared_problems(path, ranks)
        if not problems:
            for line in damaged if ranks.is_main else []:
                print(f"warning: damaged checkpoint: {line}; resuming from {path.name}", file=sys.stderr, flush=True)
            return path
        damaged.append("; ".join(problems))
    if damaged:
        raise UserError(
            f"resume: no whole checkpoint in {root}: {'; '.join(damaged)}. "
            "Restore one, or start afresh with resume: never"
        )
    return None
