"""Text to token ids. gigatoken does the work where it gives what Hugging Face tokenizers gives; else the latter does.

Special tokens are not recognised in a corpus: a document that contains the characters `<|endoftext|>` must not be able
to end itself. What a chat template wrote is encoded with them (`special`).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from ..tokenizer import read_tokenizer

PROBE_BYTES = 1024  # of a document, encoded by both encoders
FIRST_PROBES = 32  # documents, when an encoder is new
PROBES = 2  # documents, at each later check
CHECK_BYTES = 16 << 20  # of text between two checks
SHORT = 512  # bytes: the mean length under which one call for many documents pays
NASTY = (
    " ",
    "\n\n\n",
    "a<|endoftext|>b <|endoftext|>",
    "don't DON'T we'll 3.14159 0x1F 1234567890",
    "tabs\tand\r\nlines\r\n\r\n  end  ",
    "\u00e9 e\u0301 \u00df \ufb01 \u0130 \u1e9e \u2126",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3002 \ud55c\uad6d\uc5b4 \u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea \u202egnp.exe\u202c",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f \U0001f44d\U0001f3fd",
    "\u200b\u200d\ufeff\u2028\u2029\u0085\u00a0\u3000\x00\x01\x7f\ufffd\U0010ffff",
    "x" * 300 + " " * 300 + "=" * 300,
)


class EncodersDiffer(Exception):
    """The fast encoder cannot be trusted with this tokenizer or input: says why."""


class Reference:
    """Hugging Face tokenizers."""

    name = "tokenizers"

    def __init__(self, folder: Path, special: bool = False) -> None:
        """`special`: special tokens are recognised in the text."""
        self._tokenizer = read_tokenizer(folder)
        self._tokenizer.encode_special_tokens = not special
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """The tokens of each document, an integer array [T]."""
        texts = [document.decode() for document in documents]
        rows = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(row.ids, np.int64) for row in rows]


class Fast:
    """gigatoken on one thread, compared with the reference on the first documents and now and then after."""

    name = "gigatoken"

    def __init__(self, folder: Path, cache_memory: int, special: bool = False) -> None:
        """`cache_memory`: bytes that this process may grow by before the caches are emptied."""
        self._definition = _definition((folder / "tokenizer.json").read_bytes(), special)
        try:
            self._renew()
        except Exception as error:  # several kinds, for what it does not support
            reason = str(error).partition("\n")[0]  # where in its source comes after
            raise EncodersDiffer(f"gigatoken does not support this tokenizer ({reason})") from None
        self._reference = Reference(folder, special)
        self._memory = resident_memory() + cache_memory
        self._unchecked: int | None = None  # bytes since the last check

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """As `Reference.encode`. Raises EncodersDiffer when a check fails."""
        self._check(documents)
        size = sum(map(len, documents))
        if size >= SHORT * len(documents):
            return [self._tokenizer.encode(document) for document in documents]
        layout = self._tokenizer.encode_batch(list(documents), parallel=False).layout
        tokens, offsets = np.asarray(layout.content.data), np.asarray(layout.offsets.data).tolist()
        return [tokens[start:stop] for start, stop in pairwise(offsets)]

    def _check(self, documents: Sequence[bytes]) -> None:
        if self._unchecked is None:
            sample = [text.encode() for text in NASTY] + [probe(text) for text in _spread(documents, FIRST_PROBES)]
        elif self._unchecked >= CHECK_BYTES:
            sample = [probe(text) for text in _spread(documents, PROBES)]
            if resident_memory() > self._memory:
                self._renew()
        else:
            self._unchecked += sum(map(len, documents))
            return
        self._unchecked = 0
        for text, row in zip(sample, self._reference.encode(sample), strict=True):
            if not np.array_equal(self._tokenizer.encode(text), row):
                raise EncodersDiffer(f"gigatoken and Hugging Face tokenizers differ on {text.decode()[:60]!r}")

    def _renew(self) -> None:
        """Starts afresh: the caches of gigatoken 0.10.0 grow without bound."""
        import gigatoken

        self._tokenizer: Any = None
        _return_free_memory()
        self._tokenizer = gigatoken.Tokenizer.from_json(self._definition)


def make_encoder(name: str, folder: Path, cache_memory: int) -> Fast | Reference:
    """The encoder of that name. EncodersDiffer if gigatoken does not support the tokenizer."""
    return Fast(folder, cache_memory) if name == Fast.name else Reference(folder)


def _definition(raw: bytes, special: bool) -> bytes:
    """A tokenizer.json that adds nothing, and in which special tokens are matched in text or, as ids, just known."""
    content = orjson.loads(raw)
    if not special:
        content["added_tokens"] = [token for token in content.get("added_tokens") or [] if not token.get("special")]
    content["post_processor"] = content["truncation"] = content["padding"] = None
    return orjson.dumps(content)


def probe(document: bytes) -> bytes:
    """The first `PROBE_BYTES` of a document, cut between characters."""
    return document[:PROBE_BYTES].decode("utf-8", "ignore").encode()


def _spread(documents: Sequence[bytes], number: int) -> list[bytes]:
    return [documents[len(documents) * i // number] for i in range(min(number, len(documents)))]


def _return_free_memory() -> None:
    """Gives freed memory back to the system where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_memory() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
