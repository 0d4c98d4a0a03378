"""What this rank writes of a checkpoint: its share of the live engine's state, or a copy of that in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor

from ...data_prep.errors import UserError
from ...data_prep.sizes import format_bytes
from ..ranks.ranks import Ranks, accelerator
from .boxes import Box, Piece, flat_index, strides, written_pieces
from .deepspeed_state import Holding, Live, holdings
from .files import box_tensor
from .safetensors_writer import FileTensor

_BLOCK = 256 << 20  # bytes; a power of two, which is what page-locked memory is rounded up to
_ALIGNMENT = 64  # bytes, between copies


@dataclass(frozen=True)
class Share:
    """Of what this rank holds of one parameter, the pieces that it writes: of what several ranks hold alike, a part."""

    holding: Holding
    pieces: Sequence[Piece]

    def spans(self) -> list[tuple[int, int]]:
        """Ranges of the holding's flat views that hold the pieces, as few as there can be, in order."""
        found: list[tuple[int, int]] = []
        for start, stop in sorted(self._span(piece.local) for piece in self.pieces):
            if found and start <= found[-1][1]:
                found[-1] = found[-1][0], max(stop, found[-1][1])
            else:
                found.append((start, stop))
        return found

    def _span(self, local: Box) -> tuple[int, int]:
        shape, start = self.holding.local_shape, self.holding.start
        last = tuple(offset + extent - 1 for offset, extent in zip(local.offset, local.shape, strict=True))
        return flat_index(local.offset, shape) - start, flat_index(last, shape) - start + 1


HeldRange = tuple[str, int, int, int, int]  # of a holding: name, start, stop, replica, replicas


def shares(live: Live, known: dict[HeldRange, Sequence[Piece]] | None = None) -> list[Share]:
    """What this rank writes of every parameter, sorted by name. Collective in a pipeline.

    Args:
        known: what has been worked out before, which is added to; not what is held, which may be given back meanwhile.
    """
    held, ranks, known = holdings(live), live.ranks, {} if known is None else known
    skip = _written_elsewhere(held, ranks)
    found = []
    for own in held:
        if own.name not in skip:
            place = (own.name, own.start, own.stop, own.replica, own.replicas)
            if place not in known:
                known[place] = written_pieces(own.spec, *ranks.along(own.spec.axis)[:2], *place[1:])
            found.append(Share(own, known[place]))
    return found


def _written_elsewhere(held: Sequence[Holding], ranks: Ranks) -> set[str]:
    """Parameters that an earlier pipeline stage holds too (tied embeddings), and writes."""
    stages = ranks.gather_over_stages([holding.name for holding in held])
    return {name for names in stages[: ranks.pipeline] for name in names}


def live_tensors(own: Iterable[Share]) -> list[FileTensor]:
    """Entries of this rank's files that are read from the engine when they are written."""
    return _entries(own, lambda share, kind, local: share.holding.view(kind, local).to("cpu"))


class Snapshot:
    """Host memory that a rank's share is copied into, kept for the next time: fresh memory is slow to touch at first.

    Page-locked where there is an accelerator, in blocks.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        return sum(block.numel() for block in self._blocks)

    def take(self, own: Sequence[Share]) -> list[FileTensor]:
        """Entries of this rank's files that are read from a copy, which is made now and lasts until the next one.

        Raises:
            UserError: there is not so much memory.
        """
        sources = [
            _Source(share.holding.name, kind, start, view[start:stop])
            for share in own
            for kind, view in share.holding.views.items()
            for start, stop in share.spans()
        ]
        runs = _runs(sources)
        copies: dict[tuple[str, str], list[tuple[int, Tensor]]] = {}
        for run, target in zip(runs, self._room([run.joined for run in runs]), strict=True):
            target.copy_(run.joined, non_blocking=True)
            position = 0
            for source in run.sources:
                part = target[position : position + source.values.numel()]
                copies.setdefault((source.name, source.kind), []).append((source.start, part))
                position += source.values.numel()
        accelerator().synchronize()

        def read(share: Share, kind: str, local: Box) -> Tensor:
            shape = share.holding.local_shape
            place = flat_index(local.offset, shape) - share.holding.start
            parts = copies[share.holding.name, kind]
            start, copy = max((item for item in parts if item[0] <= place), key=itemgetter(0))
            return copy.as_strided(local.shape, strides(shape), copy.storage_offset() + place - start)

        return _entries(own, read)

    def _room(self, sources: Sequence[Tensor]) -> list[Tensor]:
        """A place on the host for each of these tensors."""
        sizes: list[int] = []
        places: list[tuple[int, int]] = []
        for source in sources:
            nbytes = -(-source.numel() * source.element_size() // _ALIGNMENT) * _ALIGNMENT
            if not sizes or sizes[-1] + nbytes > _BLOCK:
                sizes.append(0)
            places.append((len(sizes) - 1, sizes[-1]))
            sizes[-1] += nbytes
        if sizes != [block.numel() for block in self._blocks]:
            self._blocks = []  # given back before others are taken
            self._blocks = _allocate(sizes)
        return [
            self._blocks[block][start : start + source.numel() * source.element_size()].view(source.dtype)
            for source, (block, start) in zip(sources, places, strict=True)
        ]


@dataclass(frozen=True)
class _Source:
    """A range of a rank's state, beginning at element `start` of its holding."""

    name: str
    kind: str
    start: int
    values: Tensor


@dataclass(frozen=True)
class _Run:
    """Ranges that follow each other in the memory they are in: ZeRO keeps all parameters in few flat tensors."""

    sources: Sequence[_Source]

    @property
    def joined(self) -> Tensor:
        first = self.sources[0].values
        numel = sum(source.values.numel() for source in self.sources)
        return first.as_strided((numel,), (1,), first.storage_offset())


def _runs(sources: Sequence[_Source]) -> list[_Run]:
    found: list[list[_Source]] = []
    nbytes = 0
    ends: tuple[object, ...] = ()
    for source in sorted(sources, key=lambda source: source.values.data_ptr()):
        values = source.values
        storage, size = values.untyped_storage().data_ptr(), values.numel() * values.element_size()
        if (storage, values.dtype, values.data_ptr()) == ends and nbytes + size <= _BLOCK:
            found[-1].append(source)
            nbytes += size
        else:
            found.append([source])
            nbytes = size
        ends = storage, values.dtype, values.data_ptr() + size
    # in an order that no address decides, so that blocks of the same sizes serve again
    return [_Run(run) for run in sorted(found, key=lambda run: (run[0].name, run[0].kind, run[0].start))]


def _allocate(sizes: Sequence[int]) -> list[Tensor]:
    try:
        return [accelerator().pin_memory(torch.empty(size, dtype=torch.uint8), make_copy=False) for size in sizes]
    except RuntimeError as error:
        raise UserError(
            f"no host memory for a copy of this rank's share of a checkpoint ({format_bytes(sum(sizes))}): "
            "save.background: false does without, and training waits for the disk"
        ) from error


def _entries(own: Iterable[Share], read: Callable[[Share, str, Box], Tensor]) -> list[FileTensor]:
    def reader(share: Share, kind: str, local: Box) -> Callable[[], Tensor]:
        return lambda: read(share, kind, local)

    return [
        box_tensor(kind, share.holding.name, piece.box, reader(share, kind, piece.local))
        for share in own
        for piece in share.pieces
        for kind in share.holding.views
    ]
