"""Token stores to micro batches: windows of a split, and the stream of global batches that training consumes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from ...data_prep.errors import UserError
from ..ranks.ranks import Ranks
from ..recipe.recipe import Recipe
from .labels import IGNORE
from .ledger import digest, sample_ids
from .order import SampleOrder, Source
from .splits import Part, Split, open_split


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


@dataclass(frozen=True)
class Batch:
    """A micro batch: int64 tensors [micro batch, seq_len]; `labels` are the tokens that follow, or `IGNORE`."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        positions = None if self.position_ids is None else self.position_ids.to(device, non_blocking=True)
        return Batch(self.input_ids.to(device, non_blocking=True), self.labels.to(device, non_blocking=True), positions)

    @property
    def tokens(self) -> int:
        """Positions that carry loss."""
        return int((self.labels != IGNORE).sum())


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


def open_windows(recipe: Recipe, split: Split) -> list[Windows]:
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
    """How a global batch is cut: global batch = micro batch x data parallel ranks x accumulation, in sequences."""

    micro_batch: int
    accumulation: int
    global_batch: int
    seq_len: int
    vocab_size: int  # token ids at or above it are refused
    document_mask: bool = False

    def rows(self, ranks: Ranks, micro: int) -> range:
        """Places in the global batch that this rank's micro batch number `micro` takes."""
        first = (micro * ranks.data_size + ranks.data) * self.micro_batch
        return range(first, first + self.micro_batch)


def make_batch(rows: Sequence[tuple[Windows, int] | None], shape: BatchShape) -> Batch:
    """A micro batch of samples; a row of None carries no loss (evaluation's last batch).

    Raises:
        UserError: a sample holds a token id that the model's vocabulary does not.
    """
    seq_len, document_mask = shape.seq_len, shape.document_mask
    tokens = np.zeros((len(rows), seq_len + 1), dtype=np.int64)
    ignored = np.zeros((len(rows), seq_len), dtype=bool)
    positions = np.broadcast_to(np.arange(seq_len), ignored.shape).copy() if document_mask else None
    for row, sample in enumerate(rows):
        if sample is None:
            ignored[row] = True
            continue
        windows, number = sample
        tokens[row] = windows.tokens(number)
        if tokens[row].max() >= shape.vocab_size:
            raise UserError(
                f"{windows.part.store.path}: sample {number} holds token {tokens[row].max()}, but "
                f"the model's vocabulary has {shape.vocab_size}; prepare the data with the model's tokenizer"
            )
        if positions is not None:
            starts = windows.document_starts(number)
            for begin in starts[starts < seq_len]:
                positions[row, begin:] = np.arange(seq_len - begin)
            # the last token of a document does not predict the next document, as it would not if trained alone
            ignored[row, starts[starts > 0] - 1] = True
    labels = np.where(ignored, IGNORE, tokens[:, 1:])
    return Batch(
        torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
        torch.from_numpy(labels),
        None if positions is None else torch.from_numpy(positions),
    )


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
