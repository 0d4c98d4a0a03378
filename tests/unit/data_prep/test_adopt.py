from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from tests.unit.data_prep.samples import documents_of, megatron_files, random_documents, write_jsonl, write_prefix
from zeropipe.data_prep.cli import main
from zeropipe.data_prep.errors import UserError
from zeropipe.data_prep.making import adopt
from zeropipe.data_prep.making.adopt import import_prefixes, merge
from zeropipe.data_prep.store import TokenStore
from zeropipe.data_prep.verify import verify


@pytest.fixture
def prefixes(tmp_path: Path) -> tuple[Path, Path]:
    one = write_prefix(tmp_path / "one_text_document", random_documents(40, 1), 1000)
    return one, write_prefix(tmp_path / "two_text_document", random_documents(60, 2), 1000)


def test_files_of_megatron_are_adopted_unchanged(tmp_path: Path, prefixes: tuple[Path, Path], tokenizer: Path) -> None:
    store = import_prefixes([str(prefix) for prefix in prefixes], tmp_path / "store", tokenizer, None)
    assert (store.vocab_size, store.eod_id, store.tokenizer) == (1000, 0, tmp_path / "store/tokenizer")
    assert documents_of(store) == [*random_documents(40, 1), *random_documents(60, 2)]
    for number, prefix in enumerate(prefixes):
        for suffix in ("bin", "idx"):
            adopted = tmp_path / f"store/shard-0000{number}.{suffix}"
            assert adopted.read_bytes() == Path(f"{prefix}.{suffix}").read_bytes()


def test_adopted_files_are_checked_first(tmp_path: Path, prefixes: tuple[Path, Path], tokenizer: Path) -> None:
    write_prefix(tmp_path / "wrong", [[1, 2, 1000]], 1001)
    with pytest.raises(UserError, match=r"wrong\.bin: token 2 has the id 1000"):
        import_prefixes([str(prefixes[0]), str(tmp_path / "wrong")], tmp_path / "store", tokenizer, None)
    write_prefix(tmp_path / "wide", [[1, 2, 3]], 70_000)
    with pytest.raises(UserError, match="tokens of different types"):
        import_prefixes([str(prefixes[0]), str(tmp_path / "wide")], tmp_path / "store", tokenizer, None)
    (tmp_path / "old.idx").write_bytes(b"TNTIDX\x00\x00" + bytes(50))
    (tmp_path / "old.bin").write_bytes(b"")
    with pytest.raises(UserError, match="old non-mmap format"):
        import_prefixes([str(tmp_path / "old")], tmp_path / "store", tokenizer, None)
    assert not (tmp_path / "store").exists() and not list(tmp_path.glob(".store*"))


@pytest.mark.parametrize("piece", [10, 8 << 20])
def test_merging_writes_one_pair(
    tmp_path: Path, prefixes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(adopt, "COPY_TOKENS", piece)
    monkeypatch.setattr(adopt, "COPY_DOCUMENTS", piece)
    store = merge([str(prefix) for prefix in prefixes], tmp_path / "merged")
    documents = [*random_documents(40, 1), *random_documents(60, 2)]
    binary, index = megatron_files(documents, 1000)
    assert (tmp_path / "merged/shard-00000.bin").read_bytes() == binary
    assert (tmp_path / "merged/shard-00000.idx").read_bytes() == index
    assert len(store.shards) == 1 and not verify(store.path)


def write_uncounted(prefix: Path, documents: list[list[list[int]]], eod: int) -> Path:
    """The pair that Megatron-DeepSpeed's `preprocess_data.py --append-eod` makes of documents of sentences:
    the tokens of a document go into the .bin with the end-of-document token, the lengths of its sentences into the
    .idx without it.
    An empty document has neither.
    """
    sizes: list[int] = []
    ends, binary = [0], b""
    for sentences in documents:
        tokens = [token for sentence in sentences for token in sentence]
        if tokens:
            tokens.append(eod)
        binary += np.array(tokens, np.uint16).tobytes()
        sizes += [len(sentence) for sentence in sentences if sentence]
        ends.append(len(sizes))
    pointers = np.concatenate([[0], np.cumsum(sizes[:-1], dtype=np.int64) * 2]).astype(np.int64)
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(sizes), len(ends))
    index = header + np.array(sizes, np.int32).tobytes() + pointers.tobytes() + np.array(ends, np.int64).tobytes()
    prefix.with_name(f"{prefix.name}.bin").write_bytes(binary)
    prefix.with_name(f"{prefix.name}.idx").write_bytes(index)
    return prefix


SENTENCES = [[[5, 6], [7]], [[8]], [[]], [[9, 10, 11], [12, 13], [14]], [[]], [[15, 16]]]
WHOLE = [[5, 6, 7, 0], [8, 0], [9, 10, 11, 12, 13, 14, 0], [15, 16, 0]]


def test_an_index_that_leaves_the_ends_of_documents_out_is_made_whole(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture
) -> None:
    prefix = write_uncounted(tmp_path / "drifted", SENTENCES, eod=0)
    words = ["prepare", "--import", str(prefix), "--tokenizer", str(tokenizer), "--output", str(tmp_path / "store")]
    assert main(words) == 0
    said = "documents: 4 whose last token the .idx had left out, found in the .bin"
    assert said in capsys.readouterr().out
    store = TokenStore.open(tmp_path / "store")
    assert documents_of(store) == WHOLE and not verify(store.path)
    binary, index = megatron_files(WHOLE, 1000)
    assert Path(f"{prefix}.bin").read_bytes() == (store.path / "shard-00000.bin").read_bytes() == binary
    assert (store.path / "shard-00000.idx").read_bytes() == index


def test_many_documents_are_made_whole_together_with_others(tmp_path: Path, prefixes: tuple[Path, Path]) -> None:
    documents = [[token or 1 for token in document] for document in random_documents(500, 3)]
    drifted = write_uncounted(tmp_path / "drifted", [[document] for document in documents], eod=0)
    store = import_prefixes([str(drifted), str(prefixes[0])], tmp_path / "store", None, None)
    assert documents_of(store) == [*([*document, 0] for document in documents), *random_documents(40, 1)]


def test_elsewhere_the_cure_is_named(tmp_path: Path) -> None:
    prefix = write_uncounted(tmp_path / "drifted", SENTENCES, eod=0)
    with pytest.raises(UserError, match=r"32 bytes, but drifted\.idx describes 24: it leaves out the token 0 behind"):
        TokenStore.open(prefix)
    with pytest.raises(UserError, match=rf"`zeropipe prepare --import {prefix} --tokenizer FOLDER --output"):
        merge([str(prefix)], tmp_path / "merged")


def test_only_what_is_at_every_end_is_taken_for_it(tmp_path: Path, tokenizer: Path) -> None:
    other = write_uncounted(tmp_path / "other", SENTENCES, eod=3)
    with pytest.raises(UserError, match=r"other\.bin: its documents end in the token 3, the tokenizer's end .* \(0\)"):
        import_prefixes([str(other)], tmp_path / "store", tokenizer, None)
    prefix = write_uncounted(tmp_path / "damaged", SENTENCES, eod=0)
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    content[2 * 5] ^= 1  # the end of the second document
    Path(f"{prefix}.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"damaged\.bin: 32 bytes, .* 24: the file is truncated or damaged"):
        import_prefixes([str(prefix)], tmp_path / "store", None, None)
    short = write_uncounted(tmp_path / "short", SENTENCES, eod=0)
    Path(f"{short}.bin").write_bytes(Path(f"{short}.bin").read_bytes()[:-2])
    with pytest.raises(UserError, match=r"short\.bin: 30 bytes, .* 24: the file is truncated or damaged"):
        import_prefixes([str(short)], tmp_path / "store", None, None)
    assert not (tmp_path / "store").exists()


def test_merging_stores_keeps_what_they_know(tmp_path: Path, tokenizer: Path) -> None:
    for name in ("a", "b"):
        corpus = write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {number}" for number in range(200)])
        arguments = ["--input", corpus, "--tokenizer", tokenizer, "--shard-size", 300, "--workers", 0, "--quiet"]
        assert main(["prepare", *map(str, arguments), "--output", str(tmp_path / name)]) == 0
    stores = [TokenStore.open(tmp_path / name) for name in "ab"]
    assert len(stores[0].shards) > 2
    assert main(["merge", *(str(store.path) for store in stores), "--output", str(tmp_path / "c")]) == 0
    merged = TokenStore.open(tmp_path / "c")
    assert documents_of(merged) == documents_of(stores[0]) + documents_of(stores[1])
    assert merged.text_bytes == sum(store.text_bytes or 0 for store in stores)
    assert (merged.vocab_size, merged.eod_id, len(merged.shards)) == (1000, 0, 1)
    assert merged.tokenizer is not None and (merged.tokenizer / "tokenizer.json").exists()
    assert not verify(merged.path)


def test_what_does_not_fit_together_is_not_merged(tmp_path: Path, prefixes: tuple[Path, Path]) -> None:
    wide = write_prefix(tmp_path / "wide", [[1, 2, 3]], 70_000)
    with pytest.raises(UserError, match=r"wide cannot be merged with .*document: its dtype is int32, not uint16"):
        merge([str(prefixes[0]), str(wide)], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
