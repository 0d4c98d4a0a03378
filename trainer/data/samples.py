"""What a run draws its samples from: windows of a text's tokens, or rows of records. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ...data_prep.errors import UserError
from ...data_prep.store import BEGINS, TRAINED
from ..recipe.recipe import Recipe
from ..recipe.sources import WeightedStore
from .labels import IGNORE
from .order import SampleOrder, Source
from .packing import Rows, best_fit, single
from .splits import Part, SplitName, open_split, whole_part

TEXTS = {"sft": 1, "dpo": 2}  # of a record, by the kind of its store


@dataclass(frozen=True)
class Record:
    """One sample as an objective gets it: a row of a batch, [time] long."""

    inputs: np.ndarray  # int64 [time]
    labels: np.ndarray  # int64 [time]: the token that follows each input, or `IGNORE`
    positions: np.ndarray | None = None  # int64 [time]; None: 0, 1, 2, …
    texts: np.ndarray | None = None  # int64 [time]: of records, which of the row's texts a place belongs to; -1: none
    numbers: np.ndarray | None = None  # int64 [texts]: record * texts of a record + text, in the part of the store
    reference: np.ndarray | None = None  # fp32 [texts]: their log-probabilities before training; see engine/reference
    drawn: tuple[int, int] | None = None  # in training: seed of the run, index of the sample in it

    def padded(self, width: int) -> Record:
        """With places at the end that carry no loss and that no other place looks at."""
        extra = width - len(self.inputs)
        if not extra:
            return self
        inputs, labels = np.append(self.inputs, [0] * extra), np.append(self.labels, [IGNORE] * extra)
        positions = None if self.positions is None else np.append(self.positions, np.arange(extra))
        texts = None if self.texts is None else np.append(self.texts, [-1] * extra)
        return Record(inputs, labels, positions, texts, self.numbers, self.reference, self.drawn)


@dataclass(frozen=True)
class Windows:
    """A part of a store of text as consecutive windows of `seq_len` tokens, each with the token that follows it.

    With `document_mask`, positions count from each document's start, and none predicts the next document.
    """

    part: Part
    seq_len: int
    document_mask: bool = False

    def __len__(self) -> int:
        return max(0, (self.part.stop - self.part.start - 1) // self.seq_len)

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

    def record(self, sample: int) -> Record:
        tokens = self.tokens(sample)
        inputs, labels = tokens[:-1], tokens[1:].copy()
        if not self.document_mask:
            return Record(inputs, labels)
        positions, starts = np.arange(self.seq_len), self.document_starts(sample)
        for begin in starts[starts < self.seq_len]:
            positions[begin:] = np.arange(self.seq_len - begin)
        # the last token of a document does not predict the next document, as it would not if trained alone
        labels[starts[starts > 0] - 1] = IGNORE
        return Record(inputs, labels, positions)

    def empty(self) -> Record:
        """A sample that carries no loss: rows beyond the end of an evaluation."""
        places = np.arange(self.seq_len)
        return Record(0 * places, 0 * places + IGNORE, places if self.document_mask else None)


@dataclass(frozen=True)
class Packs:
    """The records of a part of a store, packed into rows of at most `seq_len` places, or one a row.

    A text of n tokens takes n - 1 places: what its last token would predict is another text. Attention and positions
    stay inside each text.

    Raises:
        UserError: when it is first used, if a record is longer than a row.
    """

    part: Part
    seq_len: int
    packing: str  # best_fit | none
    # fp32 [records, texts]: log-probabilities before training, where an objective needs them; NaN: not known
    reference: np.ndarray | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """Of the data in this order: records, the part of them, and how they are packed."""
        return f"{self.part.store.fingerprint}:{self.part.first}-{self.part.last}:{self.seq_len}:{self.packing}"

    @cached_property
    def lengths(self) -> np.ndarray:
        """Places that each record takes, int64 [records]."""
        return self.part.store.document_lengths()[self.part.first : self.part.last] - TEXTS[self.part.store.kind]

    @cached_property
    def rows(self) -> Rows:
        """Which records of the part lie in which row."""
        if len(self.lengths) and (longest := int(self.lengths.max())) > self.seq_len:
            long = int((self.lengths > self.seq_len).sum())
            raise UserError(
                f"{self.part.store.path}: {long:,} of {len(self.lengths):,} records do not fit into data.seq_len "
                f"{self.seq_len}: the longest takes {longest}; raise data.seq_len, or prepare the store with --seq-len "
                f"{self.seq_len}"
            )
        return single(len(self.lengths)) if self.packing == "none" else best_fit(self.lengths, self.seq_len)

    def record(self, sample: int) -> Record:
        """A row: its records one after the other, [places of them all]."""
        texts = [text for record in self.rows[sample] for text in self._texts(int(record))]
        lengths = [len(tokens) - 1 for tokens, _ in texts]
        many = self.packing != "none" or len(texts) > 1
        chosen = self.rows[sample]
        each = np.arange(TEXTS[self.part.store.kind])
        return Record(
            inputs=np.concatenate([tokens[:-1] for tokens, _ in texts]),
            labels=np.concatenate([np.where(flags[1:] & TRAINED, tokens[1:], IGNORE) for tokens, flags in texts]),
            positions=np.concatenate([np.arange(length) for length in lengths]) if many else None,
            texts=np.repeat(np.arange(len(texts)), lengths),
            numbers=(chosen[:, None] * len(each) + each).ravel(),
            reference=None if self.reference is None else self.reference[chosen].ravel(),
        )

    def empty(self) -> Record:
        """A row without records, beyond the end of an evaluation."""
        nothing, many = np.zeros(0, np.int64), self.packing != "none" or self.part.store.kind == "dpo"
        reference = None if self.reference is None else np.zeros(0, np.float32)
        return Record(nothing, nothing, nothing if many else None, nothing, nothing, reference).padded(1)

    def _texts(self, record: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens and flags of each text of a record of the part."""
        store, document = self.part.store, self.part.first + record
        start, stop = store.document_start(document), store.document_start(document + 1)
        tokens, flags = store.read(start, stop), store.flags(start, stop)
        begins = np.flatnonzero(flags & BEGINS)
        if len(begins) != TEXTS[self.part.store.kind]:
            raise UserError(
                f"{store.path}: record {document} holds {len(begins)} texts, {store.kind} stores hold "
                f"{TEXTS[self.part.store.kind]} in each: the store is damaged; `zeropipe verify` it"
            )
        return list(zip(np.split(tokens, begins[1:]), np.split(flags, begins[1:]), strict=True))


Samples = Windows | Packs


def samples_of(part: Part, seq_len: int, document_mask: bool = False, packing: str | None = None) -> Samples:
    """How a part of a store is cut into samples, by what the store holds."""
    if part.store.records is None:
        return Windows(part, seq_len, document_mask)
    return Packs(part, seq_len, packing or "best_fit")


def open_samples(recipe: Recipe, split: SplitName) -> list[Samples]:
    """The samples of one split, in the recipe's order of stores; empty where the recipe has no such split.

    Raises:
        UserError: a store is missing or damaged.
    """
    return _cut(recipe, open_split(recipe.data, split))


def open_stores(recipe: Recipe, stores: Sequence[WeightedStore]) -> list[Samples]:
    """The samples of whole stores, cut as the recipe's own. Raises as `open_samples`."""
    return _cut(recipe, [whole_part(store) for store in stores])


def _cut(recipe: Recipe, parts: Sequence[Part]) -> list[Samples]:
    data = recipe.data
    return [samples_of(part, data.seq_len, data.document_mask, data.packing) for part in parts]


def sample_order(recipe: Recipe, samples: Sequence[Samples]) -> SampleOrder:
    """The order in which a run draws from its training samples, none of which may be empty (plans refuse that)."""
    return SampleOrder([Source(own.fingerprint, len(own), own.part.weight) for own in samples], recipe.seed)
