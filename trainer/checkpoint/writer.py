"""Writing checkpoints that know no layout: every rank writes what it holds, and no tensor moves between ranks.

For every Hugging Face parameter a checkpoint holds the fp32 master weight and the optimizer's moments, in boxes
(`boxes.py`) that whoever held them wrote.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
from torch import Tensor

from ...data_prep.errors import UserError, os_problem
from ..ranks.ranks import Ranks
from .boxes import Box, written_pieces
from .deepspeed_scalars import read_scalars
from .deepspeed_state import Holding, Live, holdings
from .files import PROBE, STATE, Digest, box_tensor, write_bytes, write_json, write_rank
from .folder import CHECKPOINTS, begin, clear_leftovers, partial_path, prune, publish, step_name
from .safetensors_writer import FileTensor

_DOING = "cannot write the checkpoint (older ones are untouched)"


class CheckpointWriter(Protocol):
    """Puts a run's checkpoints on the disk. All methods but `due` are collective: every rank calls them in one order.

    An implementation decides when a checkpoint is due, how many stay, and whether training waits for the disk. What
    `save` was given may change as soon as it returns, so that one that writes in the background copies first.
    """

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after `step` optimizer steps; the same on every rank."""
        ...

    def save(self, live: Live, state: Mapping[str, Any], probe: Mapping[str, Tensor] | None = None) -> None:
        """Saves, or begins to; a checkpoint appears whole or not at all. Arguments as for the function `save`.

        Raises:
            UserError: on every rank, if one of them could not write.
        """
        ...

    def poll(self) -> list[Path]:
        """The checkpoints that were published since this was last asked, oldest first; never waits.

        Raises:
            UserError: on every rank, if what was begun has failed meanwhile.
        """
        ...

    def wait(self) -> list[Path]:
        """As `poll`, once nothing is under way any more. Call it before the run ends."""
        ...


class SynchronousWriter:
    """Saves while training waits: every `every` steps (None, 0: never) and after the last."""

    def __init__(self, output: Path, every: int | None, keep: int | None, total_steps: int) -> None:
        """`output`: the run directory; `keep`: how many checkpoints stay, None for all."""
        self._output, self._every, self._keep, self._total_steps = output, every, keep, total_steps
        self._published: list[Path] = []

    def due(self, step: int) -> bool:
        return step == self._total_steps or bool(self._every and step % self._every == 0)

    def save(self, live: Live, state: Mapping[str, Any], probe: Mapping[str, Tensor] | None = None) -> None:
        self._published.append(save(live, self._output, state, self._keep, probe))

    def poll(self) -> list[Path]:
        published, self._published = self._published, []
        return published

    wait = poll


def save(
    live: Live,
    output: Path,
    state: Mapping[str, Any],
    keep: int | None = None,
    probe: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes `output/checkpoints/step-…`, which appears whole or not at all. Collective over all ranks.

    Args:
        live: the engine between two steps; of its parameters those are saved that it names.
        state: JSON of the trainer (rank 0's counts), with `step`.
        keep: how many checkpoints stay; None keeps all.
        probe: tensors of rank 0 to store beside it.

    Raises:
        UserError: on every rank, if one of them could not write; older checkpoints are then as they were.
    """
    ranks, folder, step = live.ranks, Path(output) / CHECKPOINTS, int(state["step"])
    complete = dict(state) | {"engine": read_scalars(live.engine)}
    try:
        ranks.together(lambda: begin(folder, step) if ranks.is_main else None, _DOING, folder)
        held = holdings(live)
        tensors = _written_tensors(held, ranks, _written_elsewhere(held, ranks))
        shapes = {holding.name: holding.spec.shape for holding in held}
        partial = partial_path(folder, step)
        written = ranks.together(lambda: write_rank(partial, ranks.rank, tensors, shapes), _DOING, folder)
        files = {name: digest for of_rank in ranks.gather_objects(written) for name, digest in of_rank.items()}
        ranks.together(lambda: _finish(folder, step, files, complete, probe) if ranks.is_main else None, _DOING, folder)
    except UserError:
        if ranks.is_main:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                clear_leftovers(folder)
        raise
    if keep is not None and ranks.is_main:
        _prune(folder, keep)
    return folder / step_name(step)


def _prune(folder: Path, keep: int) -> None:
    """What cannot be removed (a file held open on NFS, say) ends no run whose checkpoint is published."""
    try:
        prune(folder, keep)
    except OSError as error:
        words, advice = os_problem(error, "cannot remove old checkpoints", folder)
        print("; ".join(filter(None, (f"warning: {words}", advice))), file=sys.stderr, flush=True)


def _finish(
    folder: Path, step: int, files: dict[str, Digest], state: Mapping[str, Any], probe: Mapping[str, Tensor] | None
) -> None:
    """What rank 0 adds when all have written."""
    partial = partial_path(folder, step)
    files[STATE] = write_json(partial / STATE, state)
    if probe is not None:
        files[PROBE] = write_bytes(partial / PROBE, safetensors.torch.save(dict(probe)))
    publish(folder, step, files)


def _written_elsewhere(held: Sequence[Holding], ranks: Ranks) -> set[str]:
    """Parameters that an earlier pipeline stage holds too (tied embeddings), and writes."""
    if ranks.pipeline_size == 1:
        return set()
    stages = ranks.gather_objects((ranks.pipeline, [holding.name for holding in held]))
    return {name for stage, names in stages if stage < ranks.pipeline for name in names}


def _written_tensors(held: Sequence[Holding], ranks: Ranks, skip: set[str]) -> list[FileTensor]:
    """What this rank writes: of what several ranks hold alike, a share."""
    tensors = []
    for holding in held:
        if holding.name in skip:
            continue
        place = (ranks.tensor, ranks.tensor_size, holding.start, holding.stop, holding.replica, holding.replicas)
        for piece in written_pieces(holding.spec, *place):
            for kind in holding.views:
                tensors.append(box_tensor(kind, holding.name, piece.box, _reader(holding, kind, piece.local)))
    return tensors


def _reader(holding: Holding, kind: str, local: Box) -> Callable[[], Tensor]:
    return lambda: holding.view(kind, local).to("cpu")
