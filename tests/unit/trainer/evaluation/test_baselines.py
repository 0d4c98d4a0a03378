"""Unigram and bigram cross entropies against dictionaries in plain Python."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from zeropipe.trainer.evaluation.baselines import STRENGTHS, HeldOut

VOCAB = 11


def markov(seed: int, length: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    tokens = [0]
    for _ in range(length - 1):
        tokens.append((tokens[-1] * 3 + 1) % VOCAB if rng.random() < 0.8 else int(rng.integers(VOCAB - 2)))
    return np.array(tokens)


def plain(train: list[int], pairs: list[tuple[int, int]]) -> tuple[float, float]:
    unigrams, bigrams, contexts = Counter(train), Counter(pairwise(train)), Counter(train[:-1])

    def p1(t: int) -> float:
        return (unigrams[t] + 1) / (len(train) + VOCAB)

    def bigram(m: float) -> float:
        return -sum(math.log((bigrams[u, t] + m * p1(t)) / (contexts[u] + m)) for u, t in pairs) / len(pairs)

    return -sum(math.log(p1(t)) for _, t in pairs) / len(pairs), min(bigram(m) for m in STRENGTHS)


@pytest.mark.parametrize("block", [7, 1000])
def test_equal_to_plain_python_whatever_the_blocks(block):
    train, held_out = markov(1, 900), markov(2, 200)
    counter = HeldOut(VOCAB)
    for first in range(0, 199, 9):
        chunk = held_out[first : first + 10]
        counter.add(chunk[:-1], chunk[1:])
    pairs = list(pairwise(held_out.tolist()))
    found = counter.entropies([(train[i : i + block] for i in range(0, len(train), block))])
    unigram, bigram = plain(train.tolist(), pairs)
    assert found.unigram == pytest.approx(unigram, rel=1e-12)
    assert found.bigram == pytest.approx(bigram, rel=1e-12)
    assert found.tokens == len(pairs) and found.train_tokens == 900
    assert found.bigram < found.unigram - 0.5  # the source is nearly a function of the previous token


def test_two_streams_are_not_joined():
    counter = HeldOut(VOCAB)
    counter.add(np.array([1]), np.array([2]))
    apart = counter.entropies([[np.array([5, 1])], [np.array([2, 5])]])
    joined = counter.entropies([[np.array([5, 1]), np.array([2, 5])]])
    assert apart.unigram == joined.unigram and joined.bigram < apart.bigram


def test_labels_without_loss_do_not_count():
    counter = HeldOut(VOCAB)
    counter.add(np.array([[1, 2, 3]]), np.array([[2, -100, 4]]))
    train = [[np.array([1, 2, 3, 4])]]
    assert counter.entropies(train).tokens == 2


def test_random_text_has_the_entropy_of_its_alphabet():
    rng = np.random.default_rng(0)
    train, held_out = rng.integers(0, VOCAB, 200_000), rng.integers(0, VOCAB, 5_000)
    counter = HeldOut(VOCAB)
    counter.add(held_out[:-1], held_out[1:])
    found = counter.entropies([[train]])
    assert found.unigram == pytest.approx(math.log(VOCAB), abs=1e-3)
    assert found.bigram == pytest.approx(math.log(VOCAB), abs=2e-3)
