"""Where held-out tokens cost how much: by the store that they are of, and by how much of a text came before them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from ..recipe.sources import WeightedStore, source_names

if TYPE_CHECKING:
    from ..data.batches import Batch
    from ..data.samples import Samples


@dataclass(frozen=True)
class TokenShare:
    """Some of the tokens."""

    name: str
    tokens: int
    loss: float  # nats a token

    def record(self) -> dict[str, Any]:
        """The fields of a record."""
        return {
            "name": self.name,
            "tokens": self.tokens,
            "loss": self.loss,
            "perplexity": math.exp(min(self.loss, 700)),
        }


class Breakdown:
    """Sums of nats and tokens by source and by position, over rows that come in the order of the samples."""

    def __init__(self, samples: Sequence[Samples]) -> None:
        self._names = source_names([WeightedStore(store=str(own.part.store.path)) for own in samples])
        self._stops = np.array(list(accumulate(map(len, samples))))
        longest = max(own.seq_len for own in samples)
        self._edges = 1 << np.arange(longest.bit_length() + 1)  # a stretch ends before each: 1, 2, 4 …
        self._rows = 0
        self._by_source = np.zeros((2, len(self._names)))
        self._by_position = np.zeros((2, len(self._edges)))

    def add(self, batch: Batch, nats: np.ndarray) -> None:
        """`nats`: of every label [rows, time]; rows beyond the last sample carry none."""
        kept = batch.labels.numpy() >= 0
        rows = self._rows + np.arange(len(kept))
        self._rows += len(kept)
        source = np.minimum(np.searchsorted(self._stops, rows, side="right"), len(self._names) - 1)
        places = np.arange(kept.shape[1])[None] if batch.position_ids is None else batch.position_ids.numpy()
        position = np.searchsorted(self._edges, np.broadcast_to(places, kept.shape), side="right")
        for sums, where in ((self._by_source, np.repeat(source, kept.sum(1))), (self._by_position, position[kept])):
            np.add.at(sums[0], where, nats[kept])
            np.add.at(sums[1], where, 1)

    def shares(self, kind: str) -> list[TokenShare]:
        """By "source" or "position"; what has no token is left out."""
        if kind == "source":
            names, sums = list(self._names), self._by_source
        else:
            firsts = [0, *self._edges.tolist()]
            names = [f"{first}-{last - 1}" if last - first > 1 else str(first) for first, last in
                     zip(firsts, self._edges.tolist(), strict=False)]  # fmt: skip
            sums = self._by_position
        found = zip(names, *sums.tolist(), strict=True)
        return [TokenShare(name, int(tokens), nats / tokens) for name, nats, tokens in found if tokens]


def breakdown_lines(breakdown: Breakdown, kinds: Sequence[str]) -> list[str]:
    """A table of each kind, for people."""
    lines = []
    for kind in kinds:
        shares = breakdown.shares(kind)
        width = max(10, *(len(share.name) for share in shares))
        what = "store" if kind == "source" else "tokens of the text before"
        lines.append(f"  by {what}:")
        lines += [
            f"    {share.name:<{width}} loss {share.loss:.4f}  perplexity {math.exp(min(share.loss, 700)):>10.2f}  "
            f"({share.tokens:,} tokens)"
            for share in shares
        ]
    return lines
