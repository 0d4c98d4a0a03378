"""Samples to micro batches, and the stream of global batches that training consumes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import torch

from ...data_prep.errors import UserError
from ..ranks.ranks import Ranks, accelerator
from .labels import IGNORE
from .ledger import digest, sample_ids
from .order import SampleOrder
from .samples import Record, Samples

ROW_SOURCES = "sources"  # of a batch's extras: int64 [rows], which source of a mixture each row is of; there of several


@dataclass(frozen=True)
class Batch:
    """A micro batch: int64 tensors [micro batch, time]; `labels` are the tokens that follow, or `IGNORE`."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None = None
    extras: Mapping[str, torch.Tensor] = field(default_factory=dict)  # the objective's own, by name, and ROW_SOURCES
    noise: torch.Tensor | None = None  # int64 [micro batch, time, 2], of embeddings in training; see `noise_of`

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self, device: torch.device) -> Batch:
        """In memory from which `device` can copy without making the host wait."""
        return self if device.type == "cpu" else self._each(accelerator().pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        positions, noise = (None if own is None else change(own) for own in (self.position_ids, self.noise))
        extras = {name: change(tensor) for name, tensor in self.extras.items()}
        return Batch(change(self.input_ids), change(self.labels), positions, extras, noise)

    @property
    def tokens(self) -> int:
        """Positions that carry loss."""
        return int((self.labels != IGNORE).sum())

    def by_source(self, values: torch.Tensor, sources: int) -> torch.Tensor:
        """Sums over the rows of each source, float64 [sources]: of `values` [rows, time], on their device."""
        sums = torch.zeros(sources, dtype=torch.float64, device=values.device)
        return sums.index_add_(0, self.extras[ROW_SOURCES], values.double().sum(1))


def stack(records: Sequence[Record], extras: Mapping[str, torch.Tensor] | None = None) -> Batch:
    """The records, of one length, as the rows of a batch."""
    positions = [record.positions for record in records if record.positions is not None]
    return Batch(
        torch.from_numpy(np.stack([record.inputs for record in records])),
        torch.from_numpy(np.stack([record.labels for record in records])),
        torch.from_numpy(np.stack(positions)) if positions else None,
        extras or {},
    )


@dataclass(frozen=True)
class StepBatch:
    """This rank's micro batches of one global batch, and which samples they are."""

    micro_batches: tuple[Batch, ...]
    first: int  # index of the global batch's first sample in the run
    stop: int
    ledger: int  # digest of the samples on this rank; sums over ranks modulo 2**64

    @property
    def tokens(self) -> int:
        """Positions that carry loss, on this rank."""
        return sum(micro.tokens for micro in self.micro_batches)


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is cut (micro batch x data parallel ranks x accumulation, in sequences) and collated."""

    micro_batch: int
    accumulation: int
    global_batch: int
    seq_len: int
    vocab_size: int  # token ids at or above it are refused
    multiple: int = 1  # to which rows shorter than seq_len are padded
    collate: Callable[[Sequence[Record]], Batch] = stack  # the objective's

    def rows(self, ranks: Ranks, micro: int) -> range:
        """Places in the global batch that this rank's micro batch number `micro` takes."""
        first = (micro * ranks.data_size + ranks.data) * self.micro_batch
        return range(first, first + self.micro_batch)

    def width(self, records: Sequence[Record]) -> int:
        """Places that each row of a micro batch has."""
        longest = max(len(record.inputs) for record in records)
        return min(self.seq_len, -(-longest // self.multiple) * self.multiple)


def make_batch(
    rows: Sequence[tuple[Samples, int | None]],
    shape: BatchShape,
    drawn: Sequence[tuple[int, int]] | None = None,
    sources: np.ndarray | None = None,
) -> Batch:
    """A micro batch of samples; one without a number carries no loss (evaluation's last batch).

    Args:
        drawn: in training, of every row: as in `Record`.
        sources: of every row, where they are to be told apart: which it is of.

    Raises:
        UserError: a sample holds a token id that the model's vocabulary does not.
    """
    records = []
    for samples, number in rows:
        if number is None:
            records.append(samples.empty())
            continue
        record = samples.record(number)
        if not 0 <= (worst := _strangest(record)) < shape.vocab_size:
            raise UserError(
                f"{samples.part.store.path}: sample {number} holds token {worst}, but "
                f"the model's vocabulary has {shape.vocab_size}; prepare the data with the model's tokenizer"
            )
        records.append(record)
    if drawn is not None:
        records = [replace(record, drawn=place) for record, place in zip(records, drawn, strict=True)]
    width = shape.width(records)
    batch = shape.collate([record.padded(width) for record in records])
    return batch if sources is None else replace(batch, extras={**batch.extras, ROW_SOURCES: torch.from_numpy(sources)})


def _strangest(record: Record) -> int:
    """The token that is no token if any is: a negative one, else the largest."""
    tokens = np.append(record.inputs, record.labels[record.labels != IGNORE])
    return int(tokens.min()) if tokens.min() < 0 else int(tokens.max())


class BatchStream:
    """Global batches in the run's order. Its whole state is `samples_consumed`; the next batch is read ahead."""

    def __init__(self, samples: Sequence[Samples], order: SampleOrder, shape: BatchShape, ranks: Ranks) -> None:
        self._samples, self._order, self._shape, self._ranks = tuple(samples), order, shape, ranks
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[StepBatch]] | None = None
        self.samples_consumed = 0

    def ahead(self) -> StepBatch:
        """This rank's part of the next global batch, without consuming it; waits until it is read."""
        first = self.samples_consumed
        if self._ahead is None or self._ahead[0] != first:
            self._ahead = first, self._reader.submit(self._read, first)
        return self._ahead[1].result()

    def next_step(self) -> StepBatch:
        """This rank's part of the next global batch; the one after it is read while this one is used."""
        step = self.ahead()
        self.samples_consumed = step.stop
        self._ahead = step.stop, self._reader.submit(self._read, step.stop)
        return step

    def named(self, first: int, stop: int) -> list[tuple[Samples, int]]:
        """The samples at these places of the run, whichever ranks consume them."""
        return self._rows(*self._order.sample(np.arange(first, stop)))

    def _rows(self, sources: np.ndarray, samples: np.ndarray) -> list[tuple[Samples, int]]:
        return [(self._samples[k], int(sample)) for k, sample in zip(sources, samples, strict=True)]

    def of_all_ranks(self, first: int, stop: int) -> list[Batch]:
        """The micro batches of these places of the run, one after the other; micro batch m of data-parallel rank d is
        number m x ranks + d.

        Raises:
            UserError: a sample cannot be read.
        """
        size = self._shape.micro_batch
        return [self._batch(np.arange(at, min(at + size, stop)))[0] for at in range(first, stop, size)]

    def drawn(self) -> dict[str, int]:
        """Samples consumed so far from each source, by the path of its store."""
        counts = self._order.counts(self.samples_consumed)
        return {str(own.part.store.path): count for own, count in zip(self._samples, counts, strict=True)}

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _read(self, first: int) -> StepBatch:
        shape = self._shape
        micro_batches, ledger = [], 0
        for micro in range(shape.accumulation):
            batch, own = self._batch(first + np.array(shape.rows(self._ranks, micro)))
            micro_batches.append(batch.pinned(self._ranks.device))
            ledger = (ledger + own) % 2**64
        return StepBatch(tuple(micro_batches), first, first + shape.global_batch, ledger)

    def _batch(self, places: np.ndarray) -> tuple[Batch, int]:
        """The samples at these places of the run as a micro batch, and their digest."""
        sources, samples = self._order.sample(places)
        rows = self._rows(sources, samples)
        drawn = [(self._order.seed, int(place)) for place in places]
        several = sources if len(self._samples) > 1 else None
        return make_batch(rows, self._shape, drawn, several), digest(places, sample_ids(sources, samples))


def evaluation_batches(
    samples: Sequence[Samples], shape: BatchShape, ranks: Ranks, batches: int | None = None
) -> Iterator[Batch]:
    """Micro batches of the first `batches` global batches of a split (None: all of it), unshuffled.

    Every rank gets the same number of micro batches; rows beyond the split's end carry no loss.
    """
    return batches_of(SplitRows(samples, None if batches is None else batches * shape.global_batch), shape, ranks)


class SplitRows(Sequence[tuple[Samples, int]]):
    """The samples of a split one after the other, at most `limit` of them, named when they are asked for: a split of
    millions of samples is not listed on every rank.
    """

    def __init__(self, samples: Sequence[Samples], limit: int | None = None) -> None:
        self._samples = samples
        self._stops = list(accumulate(map(len, samples)))
        whole = self._stops[-1] if self._stops else 0
        self._len = whole if limit is None else min(whole, limit)

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, place: int) -> tuple[Samples, int]:  # type: ignore[override]
        if not 0 <= place < self._len:
            raise IndexError(place)
        part = bisect_right(self._stops, place)
        return self._samples[part], place - (self._stops[part - 1] if part else 0)


def batches_of(rows: Sequence[tuple[Samples, int]], shape: BatchShape, ranks: Ranks) -> Iterator[Batch]:
    """This rank's micro batches of samples that are named one by one, as `evaluation_batches`."""
    for first in range(0, len(rows), shape.global_batch):
        for micro in range(shape.accumulation):
            places = [first + place for place in shape.rows(ranks, micro)]
            yield make_batch([rows[p] if p < len(rows) else (rows[0][0], None) for p in places], shape)
