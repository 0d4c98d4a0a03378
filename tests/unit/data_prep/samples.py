"""Documents that the tests of this room share, and a second, independent writer of Megatron's files."""

from __future__ import annotations

import json
import struct
import sysconfig
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer


def stdlib_texts(number: int) -> list[str]:
    """Some real text: the first modules of the standard library, by name."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:number]
    return [file.read_text("utf-8") for file in files]


def nasty_texts() -> list[str]:
    """All of Unicode but the bulk of its ideographs and empty planes, and what tends to break readers."""
    blocks = []
    for number, first in enumerate(range(0, 0x110000, 0x100)):
        uniform = 0x3400 <= first < 0xA000 or 0xAC00 <= first < 0xD700 or 0xE000 <= first < 0xF800 or first >= 0x1FC00
        characters = [chr(code) for code in range(first, first + 0x100) if not 0xD800 <= code < 0xE000]
        if characters and (not uniform or number % 64 == 0):
            blocks.append("".join(characters) + " ".join(characters) + "a1!".join(characters))
    return [
        "a",
        " ",
        "\n",
        "\r\n \r\n",
        "\x00\x00",
        "\ufeffbyte-order mark",
        "one <|endoftext|> two<|endoftext|>",
        "e\u0301 \u00e9 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u0e20\u0e32\u0e29\u0e32",
        'quotes " and \\ backslashes \\u0041 {"text": "no"}',
        "word " * 60_000,
        "x" * 40_000,
        *blocks,
    ]


def write_jsonl(path: Path, texts: Sequence[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text, "n": n}) + "\n" for n, text in enumerate(texts)), "utf-8")
    return path


def expected_tokens(folder: Path, texts: Sequence[str], eod: str = "<|endoftext|>") -> list[list[int]]:
    """What Hugging Face tokenizers alone gives, special tokens as text, with the end-of-document token at the end."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    end = tokenizer.token_to_id(eod)
    return [[*tokenizer.encode(text, add_special_tokens=False).ids, end] for text in texts]


def megatron_files(documents: Sequence[Sequence[int]], vocab_size: int) -> tuple[bytes, bytes]:
    """The bytes of `.bin` and `.idx` by the rules of Megatron's MMapIndexedDataset v1, one sequence per document."""
    if vocab_size < 65500:
        code, form, size = 8, "H", 2
    else:
        code, form, size = 4, "i", 4
    binary = b"".join(struct.pack(f"<{len(tokens)}{form}", *tokens) for tokens in documents)
    index = b"MMIDIDX\x00\x00"
    index += struct.pack("<Q", 1)
    index += struct.pack("<B", code)
    index += struct.pack("<Q", len(documents))
    index += struct.pack("<Q", len(documents) + 1)
    for tokens in documents:
        index += struct.pack("<i", len(tokens))
    offset = 0
    for tokens in documents:
        index += struct.pack("<q", offset)
        offset += len(tokens) * size
    for number in range(len(documents) + 1):
        index += struct.pack("<q", number)
    return binary, index


def write_prefix(prefix: Path, documents: Sequence[Sequence[int]], vocab_size: int) -> Path:
    binary, index = megatron_files(documents, vocab_size)
    prefix.with_name(prefix.name + ".bin").write_bytes(binary)
    prefix.with_name(prefix.name + ".idx").write_bytes(index)
    return prefix


def documents_of(store) -> list[list[int]]:
    """All documents of a TokenStore, through its public reads."""
    starts = [store.document_start(number) for number in range(store.num_documents + 1)]
    return [store.read(a, b).tolist() for a, b in pairwise(starts)]


def joined(documents: Iterable[Sequence[int]]) -> list[int]:
    return list(chain.from_iterable(documents))


def random_documents(number: int, seed: int, vocab_size: int = 1000, longest: int = 40) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, vocab_size, random.integers(1, longest)).tolist() for _ in range(number)]
