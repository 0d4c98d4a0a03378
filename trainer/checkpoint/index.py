"""Where the boxes of a checkpoint's parameters are, so that a reader goes straight to those that it needs.

`index.safetensors` has one int64 tensor a parameter, a column for each box, sorted by offset: a reader maps it, and
halves its way to its boxes. Earlier versions wrote none; what it would say is then gathered from the files' headers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import safetensors

from .boxes import Box, Shape
from .files import Digest, HashedFile, parse_key, rank_file, rank_of_file, tensor_groups
from .safetensors_writer import FileTensor, positions, safetensors_header, write_safetensors

if TYPE_CHECKING:
    pass

INDEX = "index.safetensors"
_ABSENT = -1  # position of a kind that is not stored


class StoredBox(NamedTuple):
    """Where a box is stored: its fp32 values begin at byte `position` of `file`."""

    box: Box
    file: str
    position: int


class BoxRows(NamedTuple):
    """Boxes of one parameter, a column each: int64 offset…, shape…, rank, part, and the position of each kind.

    `shape` is that of the whole parameter.
    """

    shape: Shape
    kinds: tuple[str, ...]
    columns: np.ndarray


class BoxIndex:
    """Finds boxes. `columns` gives those of one parameter as in `BoxRows`, which may be a view of a file.

    Args:
        reach: extent in the first dimension of each parameter's longest box.
    """

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        kinds: Sequence[str],
        reach: Mapping[str, int],
        columns: Callable[[str], np.ndarray],
    ) -> None:
        self.shapes, self._kinds, self._reach, self._columns = shapes, kinds, reach, columns

    @classmethod
    def open(cls, folder: Path, rank_files: Callable[[], Sequence[str]]) -> BoxIndex:
        """That of a checkpoint; `rank_files` names its files, in case it has none."""
        path = folder / INDEX
        if not path.is_file():
            return cls.of([_scanned(folder / name) for name in rank_files()])
        file = safetensors.safe_open(path, framework="pt")
        said = json.loads(file.metadata()["parameters"])
        shapes = {name: tuple(shape) for name, (shape, _) in said.items()}
        reach = {name: reach for name, (_, reach) in said.items()}
        kinds = json.loads(file.metadata()["kinds"])
        return cls(shapes, kinds, reach, lambda name: file.get_tensor(name).numpy())

    @classmethod
    def of(cls, ranks: Sequence[Mapping[str, BoxRows]]) -> BoxIndex:
        """What the ranks wrote, put together."""
        kinds = sorted({kind for rows in ranks for own in rows.values() for kind in own.kinds})
        merged: dict[str, list[BoxRows]] = {}
        for rows in ranks:
            for name, own in rows.items():
                merged.setdefault(name, []).append(own)
        columns = {name: _sorted(parts, kinds) for name, parts in sorted(merged.items())}
        shapes = {name: parts[0].shape for name, parts in merged.items()}
        reach = {name: int(found[len(shapes[name])].max()) if shapes[name] else 1 for name, found in columns.items()}
        return cls(shapes, kinds, reach, columns.__getitem__)

    def kinds(self, name: str) -> list[str]:
        """What is stored of a parameter."""
        first = self._columns(name)[2 * len(self.shapes[name]) + 2 :, 0]
        return [kind for kind, position in zip(self._kinds, first.tolist(), strict=True) if position != _ABSENT]

    def spots(self, name: str, kind: str, wanted: Box) -> Iterator[StoredBox]:
        """The boxes that have something in common with the wanted one, and perhaps a few beside them."""
        columns, dims = self._columns(name), len(self.shapes[name])
        begin, end = 0, columns.shape[1]
        if dims:
            first, low = columns[0], wanted.offset[0]
            begin = int(np.searchsorted(first, low - self._reach[name], side="right"))
            end = int(np.searchsorted(first, low + wanted.shape[0], side="left"))
        place = 2 * dims + 2 + self._kinds.index(kind)
        for row in columns[:, begin:end].T.tolist():
            if row[place] != _ABSENT:
                box = Box(tuple(row[:dims]), tuple(row[dims : 2 * dims]))
                yield StoredBox(box, rank_file(row[2 * dims], row[2 * dims + 1]), row[place])

    def write(self, path: Path) -> Digest:
        """Writes it, forced to the disk."""
        import torch

        def entry(name: str) -> FileTensor:
            columns = self._columns(name)
            return FileTensor(name, columns.shape, "int64", lambda: torch.from_numpy(columns))

        said = {name: (shape, self._reach[name]) for name, shape in self.shapes.items()}
        metadata = {"kinds": json.dumps(self._kinds), "parameters": json.dumps(said)}
        with HashedFile(path) as file:
            write_safetensors(file, [entry(name) for name in self.shapes], metadata)
            return file.finish()


def rows_of_rank(rank: int, tensors: Sequence[FileTensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, BoxRows]:
    """What `write_rank` with these arguments writes, by parameter."""
    entries: list[tuple[str, Shape, int, int]] = []
    for part, (group, metadata) in enumerate(tensor_groups(tensors, shapes)):
        places = positions(group, metadata)
        entries += [(tensor.key, tensor.shape, part, at) for tensor, at in zip(group, places, strict=True)]
    return _rows(rank, entries, shapes)


def _scanned(path: Path) -> dict[str, BoxRows]:
    """What one rank's file holds, as its header says."""
    rank, part = rank_of_file(path.name)
    with path.open("rb") as file:
        header, begin = safetensors_header(file)
    shapes = json.loads(header.pop("__metadata__")["shapes"])
    entries = [(key, tuple(said["shape"]), part, begin + said["data_offsets"][0]) for key, said in header.items()]
    return _rows(rank, entries, shapes)


def _rows(
    rank: int, entries: Iterable[tuple[str, Shape, int, int]], shapes: Mapping[str, Sequence[int]]
) -> dict[str, BoxRows]:
    """BoxRows of (key, shape, part, position)."""
    found: dict[str, dict[Box, dict[str, tuple[int, int]]]] = {}
    for key, shape, part, at in entries:
        kind, name, offset = parse_key(key)
        found.setdefault(name, {}).setdefault(Box(offset, shape), {})[kind] = part, at
    return {name: _columns(rank, tuple(shapes[name]), boxes) for name, boxes in found.items()}


def _columns(rank: int, shape: Shape, boxes: Mapping[Box, Mapping[str, tuple[int, int]]]) -> BoxRows:
    kinds = tuple(sorted({kind for places in boxes.values() for kind in places}))
    rows = []
    for box, places in boxes.items():
        for part in sorted({part for part, _ in places.values()}):  # kinds of one box may be in two files
            at = [places[kind][1] if kind in places and places[kind][0] == part else _ABSENT for kind in kinds]
            rows.append([*box.offset, *box.shape, rank, part, *at])
    return BoxRows(shape, kinds, np.asarray(rows, np.int64).T)


def _sorted(parts: Sequence[BoxRows], kinds: Sequence[str]) -> np.ndarray:
    """Boxes of several ranks by offset, with a row for each of all kinds."""
    dims = len(parts[0].shape)
    spread = []
    for _, own, columns in parts:
        wide = np.full((2 * dims + 2 + len(kinds), columns.shape[1]), _ABSENT, np.int64)
        wide[: 2 * dims + 2] = columns[: 2 * dims + 2]
        for number, kind in enumerate(own):
            wide[2 * dims + 2 + kinds.index(kind)] = columns[2 * dims + 2 + number]
        spread.append(wide)
    joined = np.concatenate(spread, axis=1)
    return np.ascontiguousarray(joined[:, np.lexsort(joined[:dims][::-1])] if dims else joined)
