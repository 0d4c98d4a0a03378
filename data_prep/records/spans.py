"""Text to token ids with special tokens recognised, and from places in the text to the tokens that hold them.

As in `encoding`: gigatoken where it gives what Hugging Face tokenizers give, else the latter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..making.encoding import NASTY, EncodersDiffer, Fast
from ..tokenizer import read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Encoded(NamedTuple):
    """One text: its ids, integers [T], and the first token that holds a character, None if none does."""

    ids: np.ndarray
    token_at: Callable[[int], int | None]


class ReferenceSpans:
    """Hugging Face tokenizers. Where tokens say how long they are, it keeps no offsets, which is faster."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lengths = _byte_lengths(tokenizer)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Without the tokens that the tokenizer puts around a text."""
        if self._lengths is None:
            return self._with_offsets(texts)
        encoded = []
        rows = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for text, row in zip(texts, rows, strict=True):
            ids, document = np.array(row.ids, np.int64), text.encode()
            ends = np.cumsum(self._lengths[ids])
            if _adds_up(ends, document):
                encoded.append(Encoded(ids, _Places(text, document, ends).token_at))
            else:  # the vocabulary lacks a byte of it
                encoded += self._with_offsets([text])
        return encoded

    def _with_offsets(self, texts: Sequence[str]) -> list[Encoded]:
        rows = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [Encoded(np.array(row.ids, np.int64), row.char_to_token) for row in rows]

    def check(self, other: FastSpans, texts: Sequence[str]) -> None:
        """Raises EncodersDiffer where the other finds another token at a character."""
        for text, ours, theirs in zip(texts, other.encode(texts), self._with_offsets(texts), strict=True):
            for place in range(len(text)):
                if ours.token_at(place) != theirs.token_at(place):
                    raise EncodersDiffer(f"gigatoken finds another token at {text[place : place + 20]!r}")


class FastSpans:
    """gigatoken. It gives ids only, but the tokens of a byte-level vocabulary say how long they are."""

    def __init__(self, folder: Path, cache_memory: int, tokenizer: Tokenizer) -> None:
        lengths = _byte_lengths(tokenizer)
        if lengths is None:
            raise EncodersDiffer("gigatoken does not serve records with this tokenizer: its tokens are not plain bytes")
        self._lengths = lengths
        self._fast = Fast(folder, cache_memory, special=True)
        texts = [*NASTY, *(f"a {token}\n\nb{token}{token} c" for token in special_tokens(tokenizer))]
        ReferenceSpans(tokenizer).check(self, texts)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """As `ReferenceSpans.encode`. Raises EncodersDiffer when a check fails."""
        documents = [text.encode() for text in texts]
        encoded = []
        for text, document, ids in zip(texts, documents, self._fast.encode(documents), strict=True):
            ends = np.cumsum(self._lengths[ids])
            if not _adds_up(ends, document):
                raise EncodersDiffer(f"the tokens of gigatoken do not add up to the text {text[:60]!r}")
            encoded.append(Encoded(ids, _Places(text, document, ends).token_at))
        return encoded


def _adds_up(ends: np.ndarray, document: bytes) -> bool:
    return len(document) == (ends[-1] if len(ends) else 0)


class _Places:
    """Where the tokens of a text end, in bytes, int64 [T]."""

    def __init__(self, text: str, document: bytes, ends: np.ndarray) -> None:
        self._text = text
        self._ascii = len(text) == len(document)
        self._ends = ends

    def token_at(self, place: int) -> int | None:
        place = place if self._ascii else len(self._text[:place].encode())
        token = int(np.searchsorted(self._ends, place, side="right"))
        return token if token < len(self._ends) else None


def _byte_lengths(tokenizer: Tokenizer) -> np.ndarray | None:
    """Bytes of text that each token stands for, by id, int64; None unless they are always the same."""
    definition = json.loads(tokenizer.to_str())
    post_processor = json.dumps(definition["post_processor"])
    added = {token["id"]: token for token in definition["added_tokens"]}
    if (
        (definition["decoder"] or {}).get("type") != "ByteLevel"
        or definition["normalizer"] is not None
        or '"trim_offsets": true' in post_processor
        or any(token["lstrip"] or token["rstrip"] for token in added.values())
    ):
        return None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, number in vocabulary.items():
        lengths[number] = len(added[number]["content"].encode()) if number in added else len(token)
    return lengths


def make_spans(name: str, folder: Path, cache_memory: int, tokenizer: Tokenizer) -> FastSpans | ReferenceSpans:
    """The encoder of that name. EncodersDiffer if gigatoken does not support the tokenizer."""
    return FastSpans(folder, cache_memory, tokenizer) if name == Fast.name else ReferenceSpans(tokenizer)


def recognising_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer as transformers sets it up: special tokens are matched in text, and nothing is cut or padded.

    `add_bos_token` and `add_eos_token` of tokenizer_config.json are not read: transformers goes by tokenizer.json too.
    """
    tokenizer = read_tokenizer(folder)
    tokenizer.encode_special_tokens = False
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def surroundings(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after a plain text, such as those of <s>."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    start = next(place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def special_tokens(tokenizer: Tokenizer) -> list[str]:
    """The special tokens of a tokenizer, by id."""
    return [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items()) if token.special]
