"""`zeropipe inspect`: what a store holds, readable."""

from __future__ import annotations

import sys
from pathlib import Path

from .errors import UserError
from .store import TokenStore
from .tokenizer import read_tokenizer


def describe_store(store: TokenStore) -> list[str]:
    """A few lines about a store as a whole."""
    vocabulary = f", vocabulary {store.vocab_size:,}" if store.vocab_size else ""
    lines = [
        f"{store.path}: {store.num_documents:,} documents, {store.num_tokens:,} tokens "
        f"({store.dtype.name}{vocabulary}) in {len(store.shards)} shard{'s' * (len(store.shards) > 1)}",
        f"fingerprint {store.fingerprint}",
    ]
    if store.text_bytes:
        lines.append(f"{store.text_bytes:,} bytes of text, {store.text_bytes / store.num_tokens:.3f} per token")
    if store.records is not None:
        from .records.display import describe_records

        lines += describe_records(store.records, read_tokenizer(store.tokenizer) if store.tokenizer else None)
    elif store.manifest:
        lines.append(f"end of document: {store.manifest.eod_token!r} ({store.eod_id})")
    if store.manifest:
        counts = ", ".join(f"{number:,} {name}" for name, number in store.manifest.counts.items())
        lines += [f"documents: {counts}"] if counts else []
    return lines


def show(path: str, documents: list[int], limit: int, tokenizer: str | None) -> None:
    """Prints the description and some documents, as ids and, with a tokenizer, as text. UserError if not there."""
    store = TokenStore.open(path)
    print("\n".join(describe_store(store)))
    folder = Path(tokenizer) if tokenizer else store.tokenizer
    decoder = read_tokenizer(folder) if folder else None
    for number in documents or range(min(3, store.num_documents)):
        if not 0 <= number < store.num_documents:
            raise UserError(f"{path}: no document {number}: they are numbered 0 to {store.num_documents - 1}")
        if store.records is not None:
            from .records.display import BRACKETS, LIGHT, show_record

            print(f"\nrecord {number}")
            print("\n".join(show_record(store, number, limit, decoder, LIGHT if sys.stdout.isatty() else BRACKETS)))
            continue
        start, stop = store.document_start(number), store.document_start(number + 1)
        ids = store.read(start, min(stop, start + limit)).tolist()
        cut = f", the first {limit}" if stop - start > limit else ""
        print(f"\ndocument {number}: {stop - start:,} tokens{cut}")
        if decoder:
            print(decoder.decode(ids, skip_special_tokens=False))
        print(" ".join(map(str, ids)))
