"""Stores made from token files that exist: `zeropipe prepare --import` and `zeropipe merge`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..index import flagged, runs, write_index
from ..manifest import FileRecord, Manifest, RecordsInfo, ShardRecord, file_record
from ..store import Shard, TokenStore
from ..tokenizer import Vocabulary, adopt_tokenizer
from ..verify import require_whole
from ..writer import ShardWriter
from .workspace import Workspace, disk_errors

COPY_TOKENS = 8 << 20
COPY_DOCUMENTS = 1 << 20
_MENDED = "whose last token the .idx had left out, found in the .bin"


def import_prefixes(
    prefixes: Sequence[str], output: Path, tokenizer: Path | None, eod_token: str | None, overwrite: bool = False
) -> TokenStore:
    """A store of existing Megatron or GPT-NeoX pairs (mmap v1), one shard each, the files unchanged.

    They are hard links where the file system allows it, else copies. Indexes and token ids are checked first. An index
    that leaves the end-of-document tokens out is replaced by a whole one.
    """
    pairs = [shard for prefix in prefixes for shard in TokenStore.open(prefix, count_ends=True).shards]
    if len({shard.dtype for shard in pairs}) > 1:
        kinds = ", ".join(f"{shard.prefix} ({shard.dtype.name})" for shard in pairs)
        raise UserError(f"the files hold tokens of different types: {kinds}; import each into a store of its own")

    def make(store: Path) -> Manifest:
        vocabulary = adopt_tokenizer(tokenizer, store / "tokenizer", eod_token) if tokenizer else None
        mended = sum(shard.num_documents for shard in pairs if shard.end is not None)
        records = []
        for number, shard in enumerate(pairs):
            require_whole(shard, vocabulary.size if vocabulary else None)
            name = f"shard-{number:05d}"
            _link(shard.bin, store / f"{name}.bin")
            if shard.end is None:
                _link(shard.idx, store / f"{name}.idx")
            else:
                _require_end(shard, vocabulary)
                write_index(store / f"{name}.idx", shard.dtype, shard.index.lengths)
            files = [file_record(store / f"{name}{suffix}") for suffix in (".bin", ".idx")]
            records.append(ShardRecord(name, shard.num_documents, shard.num_tokens, files[0], files[1]))
        return Manifest(
            dtype=pairs[0].dtype.name,
            vocab_size=vocabulary.size if vocabulary else None,
            eod_token=vocabulary.eod_token if vocabulary else None,
            eod_id=vocabulary.eod_id if vocabulary else None,
            num_documents=sum(shard.num_documents for shard in pairs),
            num_tokens=sum(shard.num_tokens for shard in pairs),
            text_bytes=None,
            shards=records,
            tokenizer=_tokenizer_records(store),
            counts={_MENDED: mended} if mended else {},
            settings={"import": list(prefixes)},
        )

    return _make_store(output, overwrite, make)


def _require_end(shard: Shard, vocabulary: Vocabulary | None) -> None:
    """UserError where the token behind each document is not what the tokenizer ends documents with."""
    if vocabulary is not None and vocabulary.eod_id != shard.end:
        raise UserError(
            f"{shard.bin}: its documents end in the token {shard.end}, the tokenizer's end of document is "
            f"{vocabulary.eod_token!r} ({vocabulary.eod_id}); name the right one with --eod-token, or take the right "
            "tokenizer"
        )


def merge(paths: Sequence[str], output: Path, overwrite: bool = False) -> TokenStore:
    """A store with one shard, whatever its size, of the documents of several stores or prefixes, in order.

    UserError unless all were made with the same tokenizer (by digest, as far as they have manifests).
    """
    stores = [TokenStore.open(path) for path in paths]
    first = stores[0]
    for store in stores[1:]:
        for what in ("dtype", "vocab_size", "eod_id"):
            mine, other = getattr(first, what), getattr(store, what)
            if mine != other:
                raise UserError(f"{store.path} cannot be merged with {first.path}: its {what} is {other}, not {mine}")
        _require_same_records(first, store)
        if _tokenizer_of(store) != _tokenizer_of(first):
            raise UserError(f"{store.path} cannot be merged with {first.path}: it was made with another tokenizer")

    def make(target: Path) -> Manifest:
        if first.tokenizer is not None:
            shutil.copytree(first.tokenizer, target / "tokenizer")
        dtype = first.dtype if first.records is None else flagged(first.dtype)
        with ShardWriter(target, dtype, 0, single="shard-00000") as writer:
            for store in stores:
                for shard in store.shards:
                    _append(shard.read_in_order(), writer)
        bytes_of_text = [store.text_bytes for store in stores]
        template = first.manifest or Manifest(first.dtype.name, None, None, None, 0, 0, None, [])
        return replace(
            template,
            num_documents=sum(store.num_documents for store in stores),
            num_tokens=sum(store.num_tokens for store in stores),
            text_bytes=None if None in bytes_of_text else sum(filter(None, bytes_of_text)),
            shards=writer.records,
            counts={},
            settings={"merge": list(map(str, paths))},
            sources=[],
            records=_merged_records(stores),
        )

    return _make_store(output, overwrite, make)


def _append(shard: Shard, writer: ShardWriter) -> None:
    """All documents of a shard, in pieces of bounded size."""
    for low in range(0, shard.num_documents, COPY_DOCUMENTS):
        high = min(low + COPY_DOCUMENTS, shard.num_documents)
        starts = np.array([shard.document_start(document) for document in range(low, high + 1)])
        lengths = np.diff(starts)
        for first, stop in runs(lengths, COPY_TOKENS):
            tokens = shard.tokens[starts[first] : starts[stop]]
            if shard.flags is not None:
                rows = np.empty(len(tokens), writer.dtype)
                rows["token"], rows["flags"] = tokens, shard.flags[starts[first] : starts[stop]]
                tokens = rows
            writer.append(tokens, lengths[first:stop])


def _require_same_records(first: TokenStore, store: TokenStore) -> None:
    """UserError unless both hold text, or records of one kind made by the same chat template."""
    kinds = [one.records.kind if one.records else "text" for one in (first, store)]
    if kinds[0] != kinds[1]:
        raise UserError(f"{store.path} cannot be merged with {first.path}: it holds {kinds[1]}, not {kinds[0]}")
    templates = [one.records.settings.get("chat_template") if one.records else None for one in (first, store)]
    if templates[0] != templates[1]:
        raise UserError(f"{store.path} cannot be merged with {first.path}: it was made with another chat template")


def _merged_records(stores: Sequence[TokenStore]) -> RecordsInfo | None:
    """What the merged records are; settings in which they differ are not told."""
    infos = [store.records for store in stores if store.records is not None]
    if not infos:
        return None
    same = {
        key: value
        for key, value in infos[0].settings.items()
        if all(info.settings.get(key) == value for info in infos[1:])
    }
    stops = sorted({number for info in infos for number in info.stop_ids})
    return RecordsInfo(infos[0].kind, max(info.longest for info in infos), stops, same)


def _make_store(output: Path, overwrite: bool, make: Callable[[Path], Manifest]) -> TokenStore:
    work = Workspace(output)
    with work.locked(), disk_errors(output):
        if output.exists() and not overwrite:
            raise UserError(f"{output}: exists already; choose another --output, or add --overwrite")
        work.clear()
        work.store.mkdir()
        manifest = make(work.store)
        manifest.save(work.store)
        work.publish(manifest.fingerprint)
    return TokenStore.open(output)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _tokenizer_records(store: Path) -> dict[str, FileRecord]:
    folder = store / "tokenizer"
    return {path.name: file_record(path) for path in sorted(folder.iterdir())} if folder.is_dir() else {}


def _tokenizer_of(store: TokenStore) -> str | None:
    """Digest of the tokenizer.json; None for a bare prefix."""
    record = store.manifest.tokenizer.get("tokenizer.json") if store.manifest else None
    return record.sha256 if record else None
