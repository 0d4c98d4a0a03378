"""Checkpoints that know no layout: saved from any engine, loaded into any other, read without one.

For every Hugging Face parameter a checkpoint holds the fp32 master weight and the optimizer's moments, in boxes
(`boxes.py`) that whoever held them wrote. Saving moves no tensor between ranks; loading reads what a rank needs.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import Parameter

from ..data_prep.errors import UserError
from .boxes import Box, pieces, share
from .checkpoint_files import (
    PROBE,
    STATE,
    Digest,
    Entry,
    Manifest,
    parse_key,
    write_bytes,
    write_json,
    write_pieces,
)
from .checkpoint_folder import (
    CHECKPOINTS,
    begin,
    check_same_run,
    find,
    ls,
    partial_path,
    problems_of,
    prune,
    publish,
    step_folders,
    tidy,
    verify,
)
from .distributed import Ranks
from .optimizer_state import MASTER, Shard, create_state, read_scalars, refresh_model, shards, write_scalars

__all__ = ["Checkpoint", "check_same_run", "load", "ls", "prune", "resolve_resume", "save", "verify"]

_OPEN_FILES = 64  # of a checkpoint at a time: thousands of ranks write more files than a process may open
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
    try:
        _together(ranks, folder, lambda: begin(folder, step) if ranks.is_main else None)
        held = shards(engine, parameters, ranks)
        entries = _entries(held, ranks, _written_elsewhere(held, ranks))
        shapes = {shard.name: shard.spec.shape for shard in held}
        written = _together(ranks, folder, lambda: write_pieces(partial, ranks.rank, entries, shapes))
        files = {name: digest for of_rank in ranks.gather_objects(written) for name, digest in of_rank.items()}
        complete = dict(state) | {"engine": read_scalars(engine)}
        _together(ranks, folder, lambda: _finish(folder, step, files, complete, probe) if ranks.is_main else None)
    except UserError:
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if ranks.is_main and keep is not None:
        prune(folder, keep)
    return folder / f"step-{step:08d}"


def _finish(
    folder: Path, step: int, files: dict[str, Digest], state: Mapping[str, Any], probe: Mapping[str, Tensor] | None
) -> None:
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
        first, last = share(shard.copy, shard.copies, _numel(shard.local_shape))
        span = max(first, shard.start), min(last, shard.stop)
        for piece in pieces(shard.spec, ranks.tensor, ranks.tensor_size, *span):
            for kind in shard.views:
                entries.append(Entry(kind, shard.name, piece.box, _reader(shard, kind, piece.local)))
    return entries


def _reader(shard: Shard, kind: str, local: Box) -> Callable[[], Tensor]:
    return lambda: shard.view(kind, local).to("cpu", torch.float32).contiguous()


def _numel(shape: Sequence[int]) -> int:
    return Box.whole(tuple(shape)).numel


class Checkpoint:
    """One checkpoint, read tensor by tensor; memory is that of one tensor. Needs no engine and no process group."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._manifest = Manifest.read(path)
        self.step = self._manifest.step
        self.state: dict[str, Any] = json.loads((path / STATE).read_bytes())
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._boxes: dict[tuple[str, str], list[tuple[Box, str, str]]] = defaultdict(list)
        self._open: OrderedDict[str, Any] = OrderedDict()
        for file in self._manifest.piece_files:
            self._index(file)

    find = staticmethod(find)

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> Checkpoint:
        """Opens the newest checkpoint of a run directory, of `checkpoints/`, or the one given.

        Raises:
            UserError: none is there, or (with `verify`, which reads it all once) it is not what was written.
        """
        found = find(path)
        problems = problems_of(found) if verify else []
        if problems:
            raise UserError(f"damaged checkpoint: {'; '.join(problems)}")
        return cls(found)

    def names(self) -> list[str]:
        """Hugging Face's parameter names, tied ones once, sorted."""
        return sorted(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def kinds(self, name: str) -> list[str]:
        """What is stored of a parameter: master, and the moments if it is trained."""
        return sorted(kind for kind, owner in self._boxes if owner == name)

    def read(self, name: str, kind: str = MASTER) -> Tensor:
        """The whole fp32 tensor, on the CPU.

        Raises:
            UserError: the checkpoint holds no such tensor, or not all of it.
        """
        if (kind, name) not in self._boxes:
            raise UserError(f"{self.path}: holds no {kind} of {name!r}")
        tensor = torch.empty(self._shapes[name], dtype=torch.float32)
        whole = Box.whole(self._shapes[name])
        self.read_into(name, kind, whole, lambda box: tensor[box.slices])
        return tensor

    def read_into(self, name: str, kind: str, wanted: Box, target: Callable[[Box], Tensor]) -> None:
        """Copies what is stored of a box into the tensors that `target` gives for its parts.

        Raises:
            UserError: part of it is not stored.
        """
        missing = wanted.numel
        for box, file, key in self._boxes[kind, name]:
            common = box.intersect(wanted)
            if common is None:
                continue
            inside = common.moved(box.offset, (0,) * len(box.offset))
            stored = self._file(file)
            whole = inside.shape == box.shape
            part = stored.get_tensor(key) if whole else stored.get_slice(key)[inside.slices]
            target(common).copy_(part)
            missing -= common.numel
        if missing:
            raise UserError(f"{self.path}: {missing} elements of {kind} of {name!r} are not stored")

    def _index(self, file: str) -> None:
        stored = self._file(file)
        shapes = json.loads(stored.metadata()["shapes"])
        self._shapes |= {name: tuple(shape) for name, shape in shapes.items()}
        for key in stored.keys():  # noqa: SIM118 (not a mapping)
            kind, name, offset = parse_key(key)
            shape = tuple(stored.get_slice(key).get_shape())
            self._boxes[kind, name].append((Box(offset, shape), file, key))

    def _file(self, name: str) -> Any:
        if name not in self._open:
            if len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)
            self._open[name] = safetensors.safe_open(self.path / name, framework="pt")
        self._open.move_to_end(name)
        return self._open[name]


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
        raise UserError(f"damaged checkpoint: {'; '.join(problems)}")
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
        if kind not in stored and kind != MASTER:
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
    if ranks.is_main and (root / CHECKPOINTS).is_dir():
        tidy(root / CHECKPOINTS)
    candidates: list[Path] = ranks.gather_objects(step_folders(root) if ranks.is_main else None)[0]
    if not candidates and resume != "auto":
        raise UserError(f"resume: {root} holds no checkpoint (expected a run directory or a step-… folder)")
    for path in candidates:
        problems = _shared_problems(path, ranks)
        if not problems:
            return path
        if ranks.is_main:
            print(f"warning: damaged checkpoint: {'; '.join(problems)}", file=sys.stderr, flush=True)
    if candidates:
        raise UserError(
            f"resume: none of the {len(candidates)} checkpoints in {candidates[0].parent} is whole (see the warnings); "
            "restore one, or start afresh with resume: never"
        )
    return None
