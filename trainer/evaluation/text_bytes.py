"""How many bytes of text each token stands for, so that losses of different tokenizers can be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ...data_prep.tokenizer import completed


def byte_lengths(tokenizer: Path, vocab_size: int) -> np.ndarray | None:
    """UTF-8 bytes per token id, int64 [vocab_size]; special tokens and unused ids stand for none.

    Only for byte-level BPE (GPT-2, Llama 3 …), where the characters of a token are bytes, one for one (Radford et al.
    2019); None for any other tokenizer, whose tokens have no byte length of their own.

    Args:
        tokenizer: a Hugging Face tokenizer folder.
    """
    with completed(tokenizer) as folder:
        file = folder / "tokenizer.json"
        if not file.is_file():
            return None
        content = json.loads(file.read_text("utf-8"))
    if content["model"].get("type") != "BPE" or not _is_byte_level(content):
        return None
    lengths = np.zeros(vocab_size, np.int64)
    for token, index in content["model"]["vocab"].items():
        if index < vocab_size:
            lengths[index] = len(token)
    for added in content.get("added_tokens", []):
        if added["id"] < vocab_size:
            lengths[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    return lengths


def _is_byte_level(content: dict[str, Any]) -> bool:
    """Whether the text is turned into bytes before, and back after: some component of either says so."""
    return any(_has_byte_level(content.get(part)) for part in ("pre_tokenizer", "decoder"))


def _has_byte_level(component: Any) -> bool:
    if not isinstance(component, dict):
        return False
    inner = component.get("pretokenizers", []) + component.get("decoders", [])
    return component.get("type") == "ByteLevel" or any(_has_byte_level(part) for part in inner)
