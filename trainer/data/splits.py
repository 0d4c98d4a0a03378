"""Train, valid and test parts of the token stores, as ranges of whole documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from ...data_prep.store import TokenStore
from ..recipe.sources import Data, WeightedStore

SplitName = Literal["train", "valid", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "valid", "test")


@dataclass(frozen=True)
class Part:
    """The part of one store that belongs to a split: documents [first, last), tokens [start, stop) of its stream."""

    store: TokenStore
    weight: float
    first: int
    last: int
    start: int
    stop: int


def split_bounds(num_documents: int, shares: Sequence[float]) -> list[tuple[int, int]]:
    """Document ranges [first, last) of each share, in order, covering all documents once.

    Exact arithmetic, so that no platform or rounding mode moves a boundary; boundary k is the cumulated share of the
    documents, rounded to the nearest.
    """
    fractions = [Fraction(str(share)) for share in shares]
    total, reached, bounds, first = sum(fractions), Fraction(0), [], 0
    for fraction in fractions:
        reached += fraction
        last = int(num_documents * reached / total + Fraction(1, 2))
        bounds.append((first, last))
        first = last
    return bounds


def whole_part(source: WeightedStore) -> Part:
    """All documents of a store. UserError if it is missing or damaged."""
    store = TokenStore.open(source.store)
    return Part(store, source.weight, 0, store.num_documents, 0, store.num_tokens)


def open_split(data: Data, split: SplitName) -> list[Part]:
    """The parts that make up a split, in the recipe's order; empty where the recipe has none.

    Raises:
        UserError: a store is missing or damaged.
    """
    own: list[WeightedStore] | None = {"valid": data.valid, "test": data.test}.get(split)
    sources = data.train if own is None else own
    parts = []
    for source in sources:
        store = TokenStore.open(source.store)
        bounds = split_bounds(store.num_documents, (1,) if own is not None else data.shares)
        first, last = bounds[0 if own is not None else SPLITS.index(split)]
        if first < last:
            start, stop = store.document_start(first), store.document_start(last)
            parts.append(Part(store, source.weight, first, last, start, stop))
    return parts
