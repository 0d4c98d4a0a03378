"""`zeropipe verify`: everything about a store that opening it takes on trust."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from .errors import UserError
from .making.bars import Told, untold
from .manifest import FileRecord, Manifest, RecordsInfo, file_record
from .store import BEGINS, TRAINED, Shard, TokenStore

_RECORDS = 1 << 16  # looked at together
_BLOCK = 4 << 20  # index entries or tokens looked at together


def verify(path: str | Path, vocab_size: int | None = None, told: Told = untold) -> list[str]:
    """Every problem found, one line each; empty if the store is whole.

    UserError if it cannot even be opened. Reads all of it, in bounded memory.

    Args:
        vocab_size: for a prefix without a manifest.
        told: how many bytes have been looked at.
    """
    store = TokenStore.open(path)
    vocabulary = store.vocab_size or vocab_size
    expected = {} if store.manifest is None else _expected(store.manifest)
    tokens = sum(shard.num_tokens * shard.dtype.itemsize for shard in store.shards)
    total, done = tokens + sum(record.bytes for record in expected.values()), 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        told(done, total)

    problems = []
    for shard in store.shards:
        shard.read_in_order()
        structure = list(index_problems(shard))
        problems += structure
        problems += token_problems(shard, vocabulary, None if structure else store.eod_id, count)
        if store.records is not None and not structure:
            problems += flag_problems(shard, store.records)
    if store.manifest is not None:
        problems += _digest_problems(store.path, expected, count)
    return problems


def index_problems(shard: Shard) -> Iterator[str]:
    """Offsets that are not the running sum of the lengths, and document entries that do not ascend from 0 to N."""
    index, itemsize = shard.index, shard.dtype.itemsize
    base = 0
    for start in range(0, index.header.sequences, _BLOCK):
        lengths = index.lengths[start : start + _BLOCK].astype(np.int64)
        if (negative := np.flatnonzero(lengths < 0)).size:
            yield f"{shard.idx}: sequence {start + negative[0]} has the length {lengths[negative[0]]}"
            return
        ends = base + np.cumsum(lengths) * itemsize
        expected = np.concatenate([[base], ends[:-1]])
        wrong = np.flatnonzero(index.offsets[start : start + _BLOCK] != expected)
        if wrong.size:
            place = start + int(wrong[0])
            yield (
                f"{shard.idx}: sequence {place} begins at byte {index.offsets[place]} of the .bin, "
                f"the lengths before it add up to {expected[wrong[0]]}"
            )
            return
        base = int(ends[-1])
    yield from _document_problems(shard)


def _document_problems(shard: Shard) -> Iterator[str]:
    documents, sequences = shard.index.documents, shard.index.header.sequences
    if len(documents) == 0 or documents[0] != 0 or documents[-1] != sequences:
        yield f"{shard.idx}: the document index does not run from 0 to {sequences}"
        return
    for start in range(0, len(documents) - 1, _BLOCK):
        steps = np.diff(documents[start : start + _BLOCK + 1].astype(np.int64))
        if (wrong := np.flatnonzero(steps < 0)).size:
            yield f"{shard.idx}: the document index falls after entry {start + wrong[0]}"
            return


def token_problems(
    shard: Shard, vocab_size: int | None, eod_id: int | None, count: Callable[[int], None] = lambda nbytes: None
) -> Iterator[str]:
    """The first id outside the vocabulary, and the first document that does not end in the end-of-document token.
    `count` is told of the bytes that have been looked at.
    """
    if vocab_size is not None:
        for start in range(0, shard.num_tokens, _BLOCK):
            block = shard.tokens[start : start + _BLOCK]
            count(block.nbytes)
            if int(block.max()) < vocab_size and int(block.min()) >= 0:
                continue
            place = int(np.flatnonzero((block >= vocab_size) | (block < 0))[0])
            yield (
                f"{shard.bin}: token {start + place} has the id {block[place]}, the vocabulary has {vocab_size} "
                f"(0 to {vocab_size - 1}): damaged, or made with another tokenizer"
            )
            break
    if eod_id is not None:
        for start in range(0, shard.index.header.sequences, _BLOCK):
            offsets = shard.index.offsets[start : start + _BLOCK] // shard.dtype.itemsize
            lasts = offsets + shard.index.lengths[start : start + _BLOCK] - 1
            if (wrong := np.flatnonzero(shard.tokens[lasts] != eod_id)).size:
                yield f"{shard.bin}: document {start + wrong[0]} does not end in the end-of-document token {eod_id}"
                break


def flag_problems(shard: Shard, records: RecordsInfo) -> Iterator[str]:
    """The first record that is not what its kind is: its texts, the flags of each, and its length."""
    path, texts = shard.prefix.with_name(f"{shard.prefix.name}.mask"), {"sft": 1, "dpo": 2}[records.kind]
    for start in range(0, shard.num_documents, _RECORDS):
        stop = min(start + _RECORDS, shard.num_documents)
        starts = np.array([shard.document_start(record) for record in range(start, stop + 1)])
        flags = np.asarray(shard.flags)[starts[0] : starts[-1]]
        begins = np.flatnonzero(flags & BEGINS)
        own = np.searchsorted(begins, starts - starts[0])  # texts before each record
        learnt = np.concatenate([[0], np.cumsum((flags & TRAINED) != 0)])
        idle = np.diff(learnt[[*begins, len(flags)]]) == 0  # of each text
        checks = {
            "holds flags that are not known": _records_with(flags > (TRAINED | BEGINS), starts),
            "does not begin with the first token of a text": (flags[starts[:-1] - starts[0]] & BEGINS) == 0,
            f"does not hold {texts} text{'s' * (texts > 1)}, as {records.kind} does": np.diff(own) != texts,
            "has a text of which nothing is learnt": np.diff(np.concatenate([[0], np.cumsum(idle)])[own]) > 0,
            f"is longer than the {records.longest} tokens that the manifest tells": np.diff(starts) > records.longest,
        }
        for problem, wrong in checks.items():
            if wrong.any():
                yield f"{path}: record {start + int(np.flatnonzero(wrong)[0])} {problem}: damaged, prepare it again"
                return


def _records_with(tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Of each record, whether a token of it is marked: bool [T] to bool [N]."""
    sums = np.concatenate([[0], np.cumsum(tokens)])
    return np.diff(sums[starts - starts[0]]) > 0


def _expected(manifest: Manifest) -> dict[str, FileRecord]:
    """Every file that the manifest tells of, by its name."""
    expected = {name: record for shard in manifest.shards for name, record in shard.files().items()}
    return expected | {f"tokenizer/{name}": record for name, record in manifest.tokenizer.items()}


def _digest_problems(path: Path, expected: Mapping[str, FileRecord], count: Callable[[int], None]) -> Iterator[str]:
    """Files whose size or SHA-256 is not what the manifest says."""
    for name, record in sorted(expected.items()):
        try:
            found = file_record(path / name)
        except OSError as error:
            yield f"{path / name}: cannot read it: {error.strerror}"
            continue
        count(record.bytes)
        if found != record:
            yield (
                f"{path / name}: {found.bytes} bytes with SHA-256 {found.sha256}, "
                f"the manifest says {record.bytes} bytes with {record.sha256}"
            )


def require_whole(shard: Shard, vocab_size: int | None) -> None:
    """UserError with the first problem of a `.bin/.idx` pair from outside."""
    shard.read_in_order()
    for problem in (*index_problems(shard), *token_problems(shard, vocab_size, None)):
        raise UserError(problem)
