"""Reading a checkpoint: whole tensors, or the boxes of them that a rank needs. No engine, no process group."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from ...data_prep.errors import UserError
from .boxes import Box, Shape
from .files import STATE, CheckpointManifest, parse_key
from .folder import newest_checkpoint

MASTER = "master"
_OPEN_FILES = 64  # of a checkpoint at a time: thousands of ranks write more files than a process may open


class Checkpoint:
    """One checkpoint, read tensor by tensor; memory is that of one tensor. Needs no engine and no process group.

    Its files' headers are read when a tensor is first asked for, and only once: pass the object on, not its path.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._manifest = CheckpointManifest.read(path)
        self.step = self._manifest.step
        self.state: dict[str, Any] = json.loads((path / STATE).read_bytes())
        self._open: OrderedDict[str, Any] = OrderedDict()

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
        return sorted(self._shapes)

    def shape(self, name: str) -> Shape:
        return self._shapes[name]

    def kinds(self, name: str) -> list[str]:
        """What is stored of a parameter: master, and the moments if it is trained."""
        return sorted(self._boxes[name])

    def read(self, name: str, kind: str = MASTER) -> Tensor:
        """The whole fp32 tensor, on the CPU.

        Raises:
            UserError: the checkpoint holds no such tensor, or not all of it.
        """
        if kind not in self._boxes.get(name, {}):
            raise UserError(f"{self.path}: holds no {kind} of {name!r}")
        tensor = torch.empty(self._shapes[name], dtype=torch.float32)
        whole = Box.whole(self._shapes[name])
        self.read_into(name, kind, whole, lambda box: tensor[box.slices])
        return tensor

    def read_into(self, name: str, kind: str, wanted: Box, target: Callable[[Box], Tensor]) -> None:
        """Copies what is stored of a box into the tensors that `target` gives for the boxes that it is stored in.

        Raises:
            UserError: not all of it is stored.
        """
        missing = wanted.numel
        for box, file, key in self._boxes[name][kind]:
            common = box.intersect(wanted)
            if common is None:
                continue
            inside = common.moved(box.offset, (0,) * len(box.offset))
            stored = self._file(file)
            whole = inside.shape == box.shape
            values = stored.get_tensor(key) if whole else stored.get_slice(key)[inside.slices]
            target(common).copy_(values)
            missing -= common.numel
        if missing:
            raise UserError(f"{self.path}: {missing} elements of {kind} of {name!r} are not stored")

    @cached_property
    def _index(self) -> tuple[dict[str, Shape], dict[str, dict[str, list[tuple[Box, str, str]]]]]:
        """Shape by name; and by name and kind, the stored boxes, each with its file and its key in it."""
        shapes: dict[str, Shape] = {}
        boxes: dict[str, dict[str, list[tuple[Box, str, str]]]] = {}
        for file in self._manifest.rank_files:
            stored = self._file(file)
            shapes |= {name: tuple(shape) for name, shape in json.loads(stored.metadata()["shapes"]).items()}
            for key in stored.keys():  # noqa: SIM118 (not a mapping)
                kind, name, offset = parse_key(key)
                box = Box(offset, tuple(stored.get_slice(key).get_shape()))
                boxes.setdefault(name, {}).setdefault(kind, []).append((box, file, key))
        return shapes, boxes

    @property
    def _shapes(self) -> dict[str, Shape]:
        return self._index[0]

    @property
    def _boxes(self) -> dict[str, dict[str, list[tuple[Box, str, str]]]]:
        return self._index[1]

    def _file(self, name: str) -> Any:
        if name not in self._open:
            if len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)
            try:
                self._open[name] = safetensors.safe_open(self.path / name, framework="pt")
            except safetensors.SafetensorError as error:
                raise UserError(f"{self.path / name}: damaged: {error}") from None
        self._open.move_to_end(name)
        return self._open[name]
