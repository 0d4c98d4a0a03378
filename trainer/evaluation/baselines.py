"""Unigram and bigram models of a training split, as yardsticks for a held-out loss. NumPy only, streaming.

Both are cross entropies of the held-out predictions under counts of the training split, in nats per token:

- unigram: p1(t) = (c(t) + 1) / (N + V), add-one smoothing;
- bigram: p2(t | u) = (c(u, t) + m * p1(t)) / (c(u) + m), the unigram as a Dirichlet prior (MacKay and Peto 1995), with
  the m, of powers of two, that serves the held-out tokens best. So it is the bar at its highest.

c counts tokens and neighbouring pairs in the training stream, document boundaries included, as a model that is trained
on packed windows sees them. Memory: the vocabulary, and the distinct held-out pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

BLOCK = 1 << 20  # tokens handled at a time
STRENGTHS = tuple(2.0**k for k in range(-2, 17))


@dataclass(frozen=True)
class Entropies:
    """Nats per predicted token, from counts of `train_tokens` tokens."""

    unigram: float
    bigram: float
    tokens: int
    train_tokens: int


@dataclass
class HeldOut:
    """The held-out predictions, as counts of distinct (previous, next) pairs. Labels below 0 carry no loss."""

    vocab_size: int
    _keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    _counts: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    _waiting: list[np.ndarray] = field(default_factory=list)  # keys not yet counted, for they are counted by sorting

    def add(self, previous: np.ndarray, following: np.ndarray) -> None:
        """Counts predictions of `following` from `previous`, int arrays of the same shape."""
        counted = following >= 0
        self._waiting.append(previous[counted].astype(np.int64) * self.vocab_size + following[counted])
        if sum(map(len, self._waiting)) > BLOCK:
            self._count()

    def _count(self) -> None:
        merged = np.concatenate([self._keys, *self._waiting])
        weights = np.concatenate([self._counts, np.ones(len(merged) - len(self._keys), np.int64)])
        self._keys, place = np.unique(merged, return_inverse=True)
        self._counts = np.bincount(place, weights, len(self._keys)).astype(np.int64)
        self._waiting = []

    def entropies(self, train: Iterable[Iterable[np.ndarray]]) -> Entropies:
        """Cross entropies under the counts of the training streams, each given as consecutive blocks of tokens.

        Raises:
            ValueError: no held-out token was added.
        """
        self._count()
        if not len(self._keys):
            raise ValueError("no held-out token carries loss")
        unigrams = np.zeros(self.vocab_size, np.int64)
        contexts = np.zeros(self.vocab_size, np.int64)
        pairs = np.zeros(len(self._keys), np.int64)
        for stream in train:
            last = np.empty(0, np.int64)  # the pair across two blocks counts as well
            for block in stream:
                unigrams += np.bincount(block, minlength=self.vocab_size)
                joined = np.concatenate([last, block])
                contexts += np.bincount(joined[:-1], minlength=self.vocab_size)
                self._count_pairs(joined, pairs)
                last = joined[-1:]
        return self._cross_entropies(unigrams, contexts, pairs)

    def _count_pairs(self, block: np.ndarray, pairs: np.ndarray) -> None:
        keys = block[:-1].astype(np.int64) * self.vocab_size + block[1:]
        place = np.searchsorted(self._keys, keys)
        place[place == len(self._keys)] = 0
        known = place[self._keys[place] == keys]
        pairs += np.bincount(known, minlength=len(pairs))

    def _cross_entropies(self, unigrams: np.ndarray, contexts: np.ndarray, pairs: np.ndarray) -> Entropies:
        previous, following = np.divmod(self._keys, self.vocab_size)
        total, train_tokens = int(self._counts.sum()), int(unigrams.sum())
        prior = (unigrams[following] + 1) / (train_tokens + self.vocab_size)

        def bigram(strength: float) -> float:
            probability = (pairs + strength * prior) / (contexts[previous] + strength)
            return -float(self._counts @ np.log(probability)) / total

        unigram = -float(self._counts @ np.log(prior)) / total
        return Entropies(unigram, min(bigram(m) for m in STRENGTHS), total, train_tokens)
