"""Reading a checkpoint: whole tensors, or the boxes of them that a rank needs. No engine, no process group."""

from __future__ import annotations

import functools
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data_prep.errors import UserError
from .boxes import Box, Shape
from .files import STATE, CheckpointManifest
from .folder import newest_checkpoint
from .index import BoxIndex, StoredBox

MASTER = "master"
_OPEN_FILES = 64  # of a checkpoint at a time: thousands of ranks write more files than a process may map


class Checkpoint:
    """One checkpoint, read tensor by tensor; memory is that of one tensor. Needs no engine and no process group.

    Its index is opened when a tensor is first asked for, and of its files those that hold what is asked for: pass the
    object on, not its path.
    """

    def __init__(self, path: Path) -> None:
        """The checkpoint at `path`, of which the manifest has been compared with the files, as far as it is to be."""
        self.path = path
        self.state: dict[str, Any] = json.loads((path / STATE).read_bytes())
        self.step: int = self.state["step"]
        self._open: OrderedDict[str, np.memmap] = OrderedDict()

    find = staticmethod(newest_checkpoint)

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> Checkpoint:
        """Opens the newest whole checkpoint of a run directory, of `checkpoints/`, or the one given.

        Raises:
            UserError: none is there, or (with `verify`, which reads it all once) none is what was written.
        """
        return cls(newest_checkpoint(path, read=verify))

    def names(self) -> list[str]:
        """Hugging Face's parameter names, tied ones once, sorted."""
        return sorted(self._index.shapes)

    def shape(self, name: str) -> Shape:
        return self._index.shapes[name]

    def kinds(self, name: str) -> list[str]:
        """What is stored of a parameter: master, and the moments if it is trained."""
        return self._index.kinds(name)

    def read(self, name: str, kind: str = MASTER) -> Tensor:
        """The whole fp32 tensor, on the CPU.

        Raises:
            UserError: the checkpoint holds no such tensor, or not all of it.
        """
        return self._read(name, kind, Box.whole(self._shape_of(name, kind)))

    def part(self, name: str, kind: str = MASTER) -> TensorPart:
        """The tensor, of which is read what is asked for.

        Raises:
            UserError: as `read`.
        """
        return TensorPart(self._shape_of(name, kind), functools.partial(self._read, name, kind))

    def read_into(self, name: str, kind: str, wanted: Box, target: Callable[[Box], Tensor]) -> None:
        """Copies what is stored of a box into the tensors that `target` gives for the boxes that it is stored in.

        Raises:
            UserError: not all of it is stored.
        """
        missing = wanted.numel
        for spot in self._index.spots(name, kind, wanted):
            common = spot.box.intersect(wanted)
            if common is None:
                continue
            inside = common.moved(spot.box.offset, (0,) * len(spot.box.offset))
            target(common).copy_(self._stored(spot)[inside.slices])
            missing -= common.numel
        if missing:
            raise UserError(f"{self.path}: {missing} elements of {kind} of {name!r} are not stored")

    def _shape_of(self, name: str, kind: str) -> Shape:
        if name not in self._index.shapes or kind not in self.kinds(name):
            raise UserError(f"{self.path}: holds no {kind} of {name!r}")
        return self.shape(name)

    def _read(self, name: str, kind: str, wanted: Box) -> Tensor:
        tensor = torch.empty(wanted.shape, dtype=torch.float32)
        here = (0,) * len(wanted.shape)
        self.read_into(name, kind, wanted, lambda box: tensor[box.moved(wanted.offset, here).slices])
        return tensor

    @functools.cached_property
    def _index(self) -> BoxIndex:
        return BoxIndex.open(self.path, lambda: CheckpointManifest.read(self.path).rank_files)

    def _stored(self, spot: StoredBox) -> Tensor:
        """A stored box, mapped."""
        if spot.file not in self._open:
            if len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)
            self._open[spot.file] = np.memmap(self.path / spot.file, np.uint8, "c")  # torch warns of what is read-only
        self._open.move_to_end(spot.file)
        own = self._open[spot.file][spot.position : spot.position + 4 * spot.box.numel]
        return torch.from_numpy(own.view(np.float32)).view(spot.box.shape)


@dataclass(frozen=True)
class TensorPart:
    """A tensor of a checkpoint that is read when it is indexed, and then no more than the slices ask for."""

    shape: Shape
    read: Callable[[Box], Tensor]

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        ranges = [own.indices(extent) for own, extent in zip(index, self.shape, strict=True)]
        return self.read(Box(tuple(a for a, _, _ in ranges), tuple(b - a for a, b, _ in ranges)))
