"""The vocabulary that a run's stores, its tokenizer and its model must agree on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from ...data_prep.errors import UserError
from ...data_prep.store import TokenStore
from ...data_prep.tokenizer import end_of_document, is_bare_vocabulary, read_tokenizer


def vocabulary_of(stores: Sequence[TokenStore], tokenizer: str | None) -> tuple[int | None, int | None]:
    """Size of the vocabulary and the end-of-document id; None where neither stores nor tokenizer tell.

    Args:
        tokenizer: the recipe's own Hugging Face folder, which must be the stores' where they have one.

    Raises:
        UserError: stores or tokenizers that do not belong together.
    """
    found: dict[tuple[int, int | None], Path] = {}
    for store in stores:
        if store.vocab_size is not None:
            found.setdefault((store.vocab_size, store.eod_id), store.path)
    if len(found) > 1:
        listed = "; ".join(f"{path}: vocabulary {size}, end of document {eod}" for (size, eod), path in found.items())
        raise UserError(f"data: the stores were prepared with different tokenizers: {listed}")
    own = Path(tokenizer) if tokenizer is not None else None
    folders = [store.tokenizer for store in stores if store.tokenizer is not None]
    _same_tokens([*([own] if own else []), *dict.fromkeys(folders)])
    if found or own is None:
        return next(iter(found), (None, None))
    loaded = read_tokenizer(own)
    return 1 + max(loaded.get_vocab(with_added_tokens=True).values()), end_of_document(own, loaded, None)[1]


def _same_tokens(folders: Sequence[Path]) -> None:
    """Refuses tokenizers that give a token different ids; files that are equal need no parsing."""
    texts: dict[bytes, Path] = {}
    for folder in folders:
        names = ("vocab.json", "merges.txt") if is_bare_vocabulary(folder) else ("tokenizer.json",)
        try:
            texts.setdefault(b"".join((folder / name).read_bytes() for name in names), folder)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None
    for first, other in pairwise(texts.values()):
        if read_tokenizer(first).get_vocab(True) != read_tokenizer(other).get_vocab(True):
            raise UserError(f"{first} and {other}: different tokenizers; use the one that prepared the data")
