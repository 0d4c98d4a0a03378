"""Boxes: hyper-rectangles of full parameters, the language in which checkpoints are written and read.

A rank holds a flat range of its tensor-parallel tensor; a checkpoint holds boxes of the full parameter, and so knows
nothing of the layout that wrote it. Pure integer geometry: no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..families.specs import ParamSpec

Shape = tuple[int, ...]


@dataclass(frozen=True, order=True)
class Box:
    """A hyper-rectangle of a tensor: elements offset[i] <= index[i] < offset[i] + shape[i] of every dimension i."""

    offset: Shape
    shape: Shape

    @classmethod
    def whole(cls, shape: Shape) -> Box:
        """The box of all of a tensor."""
        return cls((0,) * len(shape), shape)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of this box in the tensor that its offset counts from."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The common box, or None where there is none."""
        ranges = [
            (max(a, b), min(a + m, b + n))
            for a, m, b, n in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        ]
        if any(stop <= start for start, stop in ranges):
            return None
        return Box(tuple(start for start, _ in ranges), tuple(stop - start for start, stop in ranges))

    def moved(self, origin: Shape, target: Shape) -> Box:
        """The same box where `origin` is called `target`."""
        offset = tuple(o - a + b for o, a, b in zip(self.offset, origin, target, strict=True))
        return Box(offset, self.shape)


@dataclass(frozen=True)
class Piece:
    """A box of the full parameter, and the equally shaped box of a rank's tensor that holds its elements."""

    box: Box
    local: Box


def boxes_of_range(start: int, stop: int, shape: Shape) -> list[Box]:
    """Half-open flat range of a row-major tensor, cut into at most 2 * dimensions - 1 boxes, in flat order."""
    if stop <= start:
        return []
    if not shape:
        return [Box((), ())]
    row = math.prod(shape[1:])
    first, last = start // row, stop // row

    def within_row(index: int, begin: int, end: int) -> list[Box]:
        return [Box((index, *b.offset), (1, *b.shape)) for b in boxes_of_range(begin, end, shape[1:])]

    if first == last:
        return within_row(first, start % row, stop % row)
    boxes = []
    if start % row:
        boxes += within_row(first, start % row, row)
        first += 1
    if last > first:
        boxes.append(Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:])))
    return boxes + within_row(last, 0, stop % row)


def pieces(spec: ParamSpec, rank: int, size: int, start: int, stop: int) -> list[Piece]:
    """What flat range [start, stop) of tensor-parallel `rank`'s tensor is of the full parameter, without padding.

    The pieces are disjoint and hold every element of the range that lies within `spec.shape`.
    """
    found = []
    for of_range in boxes_of_range(start, stop, spec.local_shape(rank, size)):
        for local, offset in _in_full(spec, rank, size, of_range):
            box = local.moved(local.offset, offset).intersect(Box.whole(spec.shape))
            if box is not None:
                found.append(Piece(box, box.moved(offset, local.offset)))
    return found


def _in_full(spec: ParamSpec, rank: int, size: int, local: Box) -> list[tuple[Box, Shape]]:
    """The boxes into which a box of a rank's tensor falls in the full parameter, each with its offset there."""
    if spec.dim is None or size == 1:
        return [(local, local.offset)]
    dim, found, position = spec.dim, [], 0
    for begin, end in spec.ranges(rank, size):
        of_range = Box(
            (*local.offset[:dim], position, *local.offset[dim + 1 :]),
            (*local.shape[:dim], end - begin, *local.shape[dim + 1 :]),
        )
        common = local.intersect(of_range)
        if common is not None:
            into = begin + common.offset[dim] - position
            found.append((common, (*common.offset[:dim], into, *common.offset[dim + 1 :])))
        position += end - begin
    return found


def written_pieces(
    spec: ParamSpec, rank: int, size: int, start: int, stop: int, replica: int = 0, replicas: int = 1
) -> list[Piece]:
    """Those of `pieces`, cut, that this rank writes, so that all ranks together write every element once, in parallel.

    Args:
        replica, replicas: which of how many data-parallel ranks that hold the same flat range this is.
    """
    found = []
    own = pieces(spec, rank, size, start, stop)
    for whole, copy, copies in _copied_boxes(spec, rank, size):
        mine = _share(whole, copy * replicas + replica, copies * replicas)
        for piece in own:
            for box in mine:
                common = piece.box.intersect(box)
                if common is not None:
                    found.append(Piece(common, common.moved(piece.box.offset, piece.local.offset)))
    return found


def _copied_boxes(spec: ParamSpec, rank: int, size: int) -> list[tuple[Box, int, int]]:
    """Boxes of the full (padded) parameter that tensor-parallel `rank` holds, one for each of its ranges.

    Each with which of how many copies of it, on tensor-parallel ranks, this is (replicated parameters; fewer KV heads
    than ranks).
    """
    whole = Box.whole(spec.padded_shape)
    if spec.dim is None or size == 1:
        return [(whole, rank, size)]
    of_rank = [spec.ranges(r, size) for r in range(size)]
    boxes = []
    for number, (begin, end) in enumerate(of_rank[rank]):
        holders = [r for r in range(size) if of_rank[r][number] == (begin, end)]
        offset = (*whole.offset[: spec.dim], begin, *whole.offset[spec.dim + 1 :])
        shape = (*whole.shape[: spec.dim], end - begin, *whole.shape[spec.dim + 1 :])
        boxes.append((Box(offset, shape), holders.index(rank), len(holders)))
    return boxes


def _share(whole: Box, copy: int, copies: int) -> list[Box]:
    """What the `copy`-th of equal holders of a box writes: an equal run of its elements in row-major order."""
    first, last = whole.numel * copy // copies, whole.numel * (copy + 1) // copies
    origin = (0,) * len(whole.shape)
    return [box.moved(origin, whole.offset) for box in boxes_of_range(first, last, whole.shape)]


def flat_index(offset: Shape, shape: Shape) -> int:
    """Position of element `offset` in a row-major tensor of `shape`."""
    index = 0
    for position, extent in zip(offset, shape, strict=True):
        index = index * extent + position
    return index


def strides(shape: Shape) -> Shape:
    """Row-major strides in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
