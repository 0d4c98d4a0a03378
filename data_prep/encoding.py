"""Text to token ids. gigatoken does the work where it gives what Hugging Face tokenizers gives; else the latter does.

Special tokens are never recognised in text: a document that contains the characters `<|endoftext|>` must not be able
to end itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .tokenizer import load_tokenizer

PROBE_BYTES = 2048  # of a document, compared between the two encoders at intervals
NASTY = (
    "",
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


class Reference:
    """Hugging Face tokenizers, one thread."""

    name = "tokenizers"

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_tokenizer(folder)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, documents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of all documents, uint32 [T], and where each begins and the last ends, int64 [N + 1]."""
        texts = [document.decode() for document in documents]
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        tokens = np.concatenate([np.array(row, np.uint32) for row in rows]) if rows else np.empty(0, np.uint32)
        return tokens, offsets


class Fast:
    """gigatoken, one thread."""

    name = "gigatoken"

    def __init__(self, folder: Path) -> None:
        self._definition = _without_special_tokens((folder / "tokenizer.json").read_text("utf-8"))
        self.recycle()

    def recycle(self) -> None:
        """Starts afresh with empty caches; those of gigatoken 0.10.0 grow without bound."""
        import gigatoken

        self._tokenizer: Any = None
        self._tokenizer = gigatoken.Tokenizer.from_json(self._definition)

    def encode(self, documents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """As `Reference.encode`."""
        layout = self._tokenizer.encode_batch(documents, parallel=False).layout
        return np.asarray(layout.content.data), np.asarray(layout.offsets.data)


def _without_special_tokens(definition: str) -> str:
    """A tokenizer.json in which no special token is matched in text. Their ids stay in the vocabulary."""
    content = json.loads(definition)
    content["added_tokens"] = [token for token in content.get("added_tokens") or [] if not token.get("special")]
    content["post_processor"] = content["truncation"] = content["padding"] = None
    return json.dumps(content)


def same_tokens(one: Any, other: Any, documents: list[bytes]) -> bool:
    """Whether two encoders give the same tokens, document for document."""
    (a, a_offsets), (b, b_offsets) = one.encode(documents), other.encode(documents)
    return np.array_equal(a_offsets, b_offsets) and np.array_equal(a, b)


def probe(document: bytes) -> bytes:
    """The first `PROBE_BYTES` of a document, cut between characters."""
    return document[:PROBE_BYTES].decode("utf-8", "ignore").encode()


def choose_encoder(folder: Path, sample: list[bytes]) -> tuple[str, str | None]:
    """Name of the encoder for a job, and why it is not the fast one if it is not."""
    reference = Reference(folder)
    documents = [text.encode() for text in NASTY] + [probe(document) for document in sample]
    try:
        fast = Fast(folder)
    except Exception as error:  # the library raises several kinds for what it does not support
        return Reference.name, f"gigatoken does not support this tokenizer ({error})"
    if same_tokens(fast, reference, documents):
        return Fast.name, None
    return Reference.name, "gigatoken's tokens differ from those of Hugging Face tokenizers on a sample of the input"


def make_encoder(name: str, folder: Path) -> Fast | Reference:
    return Fast(folder) if name == Fast.name else Reference(folder)
