from __future__ import annotations

import os
import struct
import time
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest

from tests.unit.data_prep.samples import documents_of, joined, megatron_files, random_documents, write_prefix
from zeropipe.data_prep.errors import UserError
from zeropipe.data_prep.index import token_dtype
from zeropipe.data_prep.making.encoding import resident_memory
from zeropipe.data_prep.manifest import Manifest
from zeropipe.data_prep.store import TokenStore
from zeropipe.data_prep.writer import ShardWriter


def write_store(
    folder: Path, documents: list[list[int]], vocab_size: int, shard_bytes: int, step: int = 7
) -> TokenStore:
    """A store of given tokens, appended `step` documents at a time."""
    folder.mkdir()
    dtype = token_dtype(vocab_size)
    with ShardWriter(folder, dtype, shard_bytes) as writer:
        for start in range(0, len(documents), step):
            some = documents[start : start + step]
            writer.append(np.array(joined(some), dtype), np.array([len(tokens) for tokens in some]))
    total = sum(map(len, documents))
    Manifest(dtype.name, vocab_size, None, None, len(documents), total, None, writer.records).save(folder)
    return TokenStore.open(folder)


@pytest.mark.parametrize("vocab_size", [1000, 65_499, 65_500, 300_000])
def test_a_shard_is_megatrons_byte_for_byte(tmp_path: Path, vocab_size: int) -> None:
    documents = [*random_documents(200, 1, vocab_size), [vocab_size - 1], [0] * 70_000]
    write_store(tmp_path / "store", documents, vocab_size, 1 << 30)
    binary, index = megatron_files(documents, vocab_size)
    assert (tmp_path / "store/shard-00000.bin").read_bytes() == binary
    assert (tmp_path / "store/shard-00000.idx").read_bytes() == index


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_shards_end_where_the_documents_say(tmp_path: Path, step: int) -> None:
    documents = [*random_documents(60, 2), [5] * 400, *random_documents(3, 3)]
    store = write_store(tmp_path / "store", documents, 1000, 200, step)
    sizes = [shard.bin.stat().st_size for shard in store.shards]
    assert len(sizes) > 5 and max(sizes) == 800  # the long document has a shard to itself
    assert all(size <= 200 for size in sizes if size != 800)
    for shard, following in zip(store.shards, store.shards[1:], strict=False):
        first = following.document_start(1) * 2
        assert shard.bin.stat().st_size + first > 200  # it would not have fitted
    assert documents_of(store) == documents


def test_reads_equal_the_plain_list(tmp_path: Path) -> None:
    documents = random_documents(80, 4)
    store = write_store(tmp_path / "store", documents, 1000, 300)
    stream = joined(documents)
    starts = [0, *accumulate(map(len, documents))]
    assert (store.num_documents, store.num_tokens, len(store.shards) > 5) == (80, len(stream), True)
    assert [store.document_start(number) for number in range(81)] == starts
    random = np.random.default_rng(5)
    for start, stop in np.sort(random.integers(0, len(stream) + 1, (300, 2)), axis=1).tolist():
        tokens = store.read(start, stop)
        assert tokens.dtype == np.int64 and tokens.tolist() == stream[start:stop]
        expected = [place for place in starts[:-1] if start <= place < stop]
        assert store.document_starts(start, stop).tolist() == expected
    with pytest.raises(IndexError):
        store.read(0, len(stream) + 1)
    with pytest.raises(IndexError):
        store.document_start(81)


def test_a_bare_prefix_is_a_store(tmp_path: Path) -> None:
    documents = random_documents(30, 6)
    prefix = write_prefix(tmp_path / "corpus.v1_text_document", documents, 1000)
    for name in (str(prefix), f"{prefix}.bin", f"{prefix}.idx"):
        store = TokenStore.open(name)
        assert documents_of(store) == documents
        assert (store.vocab_size, store.eod_id, store.tokenizer, store.text_bytes) == (None, None, None, None)
    before = store.fingerprint
    assert TokenStore.open(prefix).fingerprint == before
    documents[3][0] ^= 1
    write_prefix(prefix, documents, 1000)
    assert TokenStore.open(prefix).fingerprint != before


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    """Megatron's preprocessing by sentences: the document index, not the sequences, says where documents begin."""
    sequences = random_documents(6, 7)
    binary, index = megatron_files(sequences, 1000)
    head = bytearray(index[: 34 + 12 * 6])
    head[26:34] = struct.pack("<Q", 4)
    (tmp_path / "p.bin").write_bytes(binary)
    (tmp_path / "p.idx").write_bytes(bytes(head) + struct.pack("<4q", 0, 2, 3, 6))
    store = TokenStore.open(tmp_path / "p")
    assert documents_of(store) == [joined(sequences[a:b]) for a, b in ((0, 2), (2, 3), (3, 6))]


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    documents = random_documents(20, 8)
    one = write_store(tmp_path / "one", documents, 1000, 1 << 20)
    same = write_store(tmp_path / "same", documents, 1000, 1 << 20)
    documents[7][0] ^= 1
    other = write_store(tmp_path / "other", documents, 1000, 1 << 20)
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing: no token store here.*zeropipe prepare"):
        TokenStore.open(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        TokenStore.open(tmp_path)
    (tmp_path / "old.bin").write_bytes(b"")
    (tmp_path / "old.idx").write_bytes(b"TNTIDX\x00\x00" + bytes(100))
    with pytest.raises(UserError, match=r"old\.idx: this is the old non-mmap format"):
        TokenStore.open(tmp_path / "old")
    (tmp_path / "other.bin").write_bytes(b"")
    (tmp_path / "other.idx").write_bytes(b"something else entirely, but long enough")
    with pytest.raises(UserError, match=r"other\.idx: not a Megatron mmap index"):
        TokenStore.open(tmp_path / "other")
    (tmp_path / "lonely.idx").write_bytes(megatron_files([[1]], 1000)[1])
    with pytest.raises(UserError, match=r"lonely\.bin: no such file"):
        TokenStore.open(tmp_path / "lonely")


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str) -> None:
    write_store(tmp_path / "store", random_documents(20, 9), 1000, 1 << 20)
    file = tmp_path / f"store/shard-00000.{suffix}"
    os.truncate(file, file.stat().st_size - 2)
    with pytest.raises(UserError, match=rf"shard-00000\.{suffix}: \d+ bytes, but .*truncated"):
        TokenStore.open(tmp_path / "store")


def test_a_changed_manifest_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "store", random_documents(20, 10), 1000, 1 << 20)
    path = tmp_path / "store/manifest.json"
    path.write_text(path.read_text().replace('"vocab_size": 1000', '"vocab_size": 2000'))
    with pytest.raises(UserError, match=r"manifest\.json: fingerprint .* does not fit"):
        TokenStore.open(tmp_path / "store")
    path.write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: not valid JSON"):
        TokenStore.open(tmp_path / "store")


@pytest.mark.parametrize("where", ["shards", "tokenizer"])
def test_a_manifest_cannot_point_outside_of_its_store(tmp_path: Path, where: str) -> None:
    write_store(tmp_path / "store", random_documents(20, 10), 1000, 1 << 20)
    manifest = Manifest.load(tmp_path / "store")
    record = manifest.shards[0]
    changed: dict = {"shards": [replace(record, name="../other")], "tokenizer": {"../other": record.bin}}
    replace(manifest, **{where: changed[where]}).save(tmp_path / "store")
    with pytest.raises(UserError, match=r"manifest\.json: '\.\./other' is not the name of a file in the store"):
        TokenStore.open(tmp_path / "store")


def sparse_prefix(prefix: Path, documents: int, length: int) -> None:
    """A pair of `documents` x `length` tokens that takes next to no disk: all but the ends are holes."""
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, documents, documents + 1))
        file.seek(34 + 4 * (documents - 1))
        file.write(struct.pack("<i", length))
        file.seek(34 + 12 * documents - 8)
        file.write(struct.pack("<q", (documents - 1) * length * 2))
        file.seek(34 + 20 * documents)
        file.write(struct.pack("<q", documents))
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(documents * length * 2)


def test_opening_a_billion_documents_reads_none_of_them(tmp_path: Path) -> None:
    """20 GB of index, 2 TB of tokens, all holes: what was read would show as time and as memory."""
    sparse_prefix(tmp_path / "huge", 10**9, 1000)
    before, start = resident_memory(), time.perf_counter()
    store = TokenStore.open(tmp_path / "huge")
    assert (store.num_documents, store.num_tokens) == (10**9, 10**12)
    random = np.random.default_rng(11)
    for place in random.integers(0, 10**12 - 1025, 64).tolist():
        assert store.read(place, place + 1025).shape == (1025,)
    assert store.document_start(10**9 - 1) == 0  # a hole: the index was not made up
    assert time.perf_counter() - start < 1
    assert resident_memory() - before < 50e6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["huge.bin", "huge.idx"]
