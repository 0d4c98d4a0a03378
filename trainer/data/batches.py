"""Token stores to micro batches: windows of a split, and the stream of global batches that training consumes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from ...data_prep.errors import UserError
from ..ranks.ranks import Ranks
from ..recipe.recipe import Recipe
from .labels import IGNORE
from .ledger import digest, sample_ids
from .order import SampleOrder, Source
from .splits import Part, SplitName, open_split


@dataclass(frozen=True)
class Windows:
    """A part of a store as consecutive windows of `seq_len` tokens, each with the token that follows it."""

    part: Part
    seq_len: int

    def __len__(self) -> int:
        return self.part.samples(self.seq_len)

    @property
    def fingerprint(self) -> str:
        """Of the data in this order: tokens, the part of them, and how they are cut."""
        return f"{self.part.store.fingerprint}:{self.part.start}-{self.part.stop}:{self.seq_len}"

    def tokens(self, sample: int) -> np.ndarray:
        """int64 [seq_len + 1]: the window and the token after it."""
        first = self.part.start + sample * self.seq_len
        return self.part.store.read(first, first + self.seq_len + 1)

    def document_starts(self, sample: int) -> np.ndarray:
        """Places in [0, seq_len] at which a document begins."""
        first = self.part.start + sample * self.seq_len
        return self.part.store.document_starts(first, first + self.seq_len + 1) - first

    def record(self, sample: int, document_mask: bool = False) -> Record:
        """One sample; with `document_mask`, positions count from each document's start."""
        tokens, ignored = self.tokens(sample), np.zeros(self.seq_len, dtype=bool)
        if not document_mask:
            return Record(tokens, ignored)
        positions, starts = np.arange(self.seq_len), self.document_starts(sample)
        for begin in starts[starts < self.seq_len]:
            positions[begin:] = np.arange(self.seq_len - begin)
        # the last token of a document does not predict the next document, as it would not if trained alone
        ignored[starts[starts > 0] - 1] = True
        return Record(tokens, ignored, positions)


@dataclass(frozen=True)
class Record:
    """One sample as an objective gets it."""

    tokens: np.ndarray  # int64 [seq_len + 1]: the inputs and the token after them
    ignored: np.ndarray  # bool [seq_len]: places whose next token carries no loss
    positions: np.ndarray | None = None  # int64 [seq_len]; None: 0, 1, 2, …

    @classmethod
    def empty(cls, seq_len: int, document_mask: bool = False) -> Record:
        """A sample that carries no loss: rows beyond the end of an evaluation."""
        tokens, ignored = np.zeros(seq_len + 1, dtype=np.int64), np.ones(seq_len, dtype=bool)
        return cls(tokens, ignored, np.arange(seq_len) if document_mask else None)


@dataclass(frozen=True)
class Batch:
    """A micro batch: int64 tensors [micro batch, seq_len]; `labels` are the tokens that follow, or `IGNORE`."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None = None
    extras: Mapping[str, torch.Tensor] = field(default_factory=dict)  # the objective's own, by name

    def to(self, device: torch.device) -> Batch:
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        positions = None if self.position_ids is None else moved(self.position_ids)
        extras = {name: moved(tensor) for name, tensor in self.extras.items()}
        return Batch(moved(self.input_ids), moved(self.labels), positions, extras)

    @property
    def tokens(self) -> int:
        """Positions that carry loss."""
        return int((self.labels != IGNORE).sum())


def stack(records: Sequence[Record], extras: Mapping[str, torch.Tensor] | None = None) -> Batch:
    """The records as the rows of a batch."""
    tokens = np.stack([record.tokens for record in records])
    labels = np.where(np.stack([record.ignored for record in records]), IGNORE, tokens[:, 1:])
    positions = [record.positions for record in records if record.positions is not None]
    return Batch(
        torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
        torch.from_numpy(labels),
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


def open_windows(recipe: Recipe, split: SplitName) -> list[Windows]:
    """The windows of one split, in the recipe's order of stores; empty where the recipe has no such split.

    Raises:
        UserError: a store is missing or damaged.
    """
    return [Windows(part, recipe.data.seq_len) for part in open_split(recipe.data, split)]


def sample_order(recipe: Recipe, windows: Sequence[Windows]) -> SampleOrder:
    """The order in which a run draws from its training windows, none of which may be empty (plans refuse that)."""
    return SampleOrder([Source(w.fingerprint, len(w), w.part.weight) for w in windows], recipe.seed)


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is cut (micro batch x data parallel ranks x accumulation, in sequences) and collated."""

    micro_batch: int
    accumulation: int
    global_batch: int
    seq_len: int
    vocab_size: int  # token ids at or above it are refused
    document_mask: bool = False
    collate: Callable[[Sequence[Record]], Batch] = stack  # the objective's

    def rows(self, ranks: Ranks, micro: int) -> range:
        """Places in the global batch that this rank's micro batch number `micro` takes."""
        first = (micro * ranks.data_size + ranks.data) * self.micro_batch
        return range(first, first + self.micro_batch)


def make_batch(rows: Sequence[tuple[Windows, int] | None], shape: BatchShape) -> Batch:
    """A micro batch of samples; a row of None carries no loss (evaluation's last batch).

    Raises:
        UserError: a sample holds a token id that the model's vocabulary does not.
    """
    records = []
    for sample in rows:
        if sample is None:
            records.append(Record.empty(shape.seq_len, shape.document_mask))
            continue
        windows, number = sample
        record = windows.record(number, shape.document_mask)
        if not 0 <= (worst := _strangest(record.tokens)) < shape.vocab_size:
            raise UserError(
                f"{windows.part.store.path}: sample {number} holds token {worst}, but "
                f"the model's vocabulary has {shape.vocab_size}; prepare the data with the model's tokenizer"
            )
        records.append(record)
    return shape.collate(records)


def _strangest(tokens: np.ndarray) -> int:
    """The token that is no token if any is: a negative one, else the largest."""
    return int(tokens.min()) if tokens.min() < 0 else int(tokens.max())


class BatchStream:
    """Global batches in the run's order. Its whole state is `samples_consumed`; the next batch is read ahead."""

    def __init__(self, windows: Sequence[Windows], order: SampleOrder, shape: BatchShape, ranks: Ranks) -> None:
        self._windows, self._order, self._shape, self._ranks = tuple(windows), order, shape, ranks
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[StepBatch]] | None = None
        self.samples_consumed = 0

    def next_step(self) -> StepBatch:
        """This rank's part of the next global batch."""
        first = self.samples_consumed
        if self._ahead is None or self._ahead[0] != first:
            self._ahead = first, self._reader.submit(self._read, first)
        step = self._ahead[1].result()
        self.samples_consumed = step.stop
        self._ahead = step.stop, self._reader.submit(self._read, step.stop)
        return step

    def drawn(self) -> dict[str, int]:
        """Samples consumed so far from each source, by the path of its store."""
        counts = self._order.counts(self.samples_consumed)
        return {str(windows.part.store.path): count for windows, count in zip(self._windows, counts, strict=True)}

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
            positions = first + np.array(shape.rows(self._ranks, micro))
            sources, samples = self._order.sample(positions)
            rows = [(self._windows[k], int(sample)) for k, sample in zip(sources, samples, strict=True)]
            micro_batches.append(make_batch(rows, shape))
            ledger = (ledger + digest(positions, sample_ids(sources, samples))) % 2**64
        return StepBatch(tuple(micro_batches), first, first + shape.global_batch, ledger)


def evaluation_batches(
    windows: Sequence[Windows], shape: BatchShape, ranks: Ranks, batches: int | None = None
) -> Iterator[Batch]:
    """Micro batches of the first `batches` global batches of a split (None: all of it), unshuffled.

    Every rank gets the same number of micro batches; rows beyond the split's end carry no loss.
    """
    samples = [(source, number) for source in windows for number in range(len(source))]
    wanted = -(-len(samples) // shape.global_batch) if batches is None else batches
    for first in range(0, min(wanted * shape.global_batch, len(samples)), shape.global_batch):
        for micro in range(shape.accumulation):
            places = [first + place for place in shape.rows(ranks, micro)]
            rows = [samples[place] if place < len(samples) else None for place in places]
            yield make_batch(rows, shape)
