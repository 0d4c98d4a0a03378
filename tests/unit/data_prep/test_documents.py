from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data_prep.samples import nasty_texts, write_jsonl
from zeropipe.data_prep.corpus.documents import read_documents
from zeropipe.data_prep.corpus.slices import BadDocument
from zeropipe.data_prep.corpus.sources import SourceOptions, cut, plan_tasks, whole_file
from zeropipe.data_prep.errors import UserError

TEXTS = nasty_texts()
COMPRESSORS = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": zstandard.ZstdCompressor().compress,
}


def read(inputs: list[Path], text_key: str = "text", **options) -> list[str]:
    """All documents of some inputs through the planner and the readers, as `prepare` reads them."""
    return [text.decode() for text in read_raw(inputs, text_key, fail, **options)]


def read_raw(inputs: list[Path], text_key: str, bad: Callable[[BadDocument], None], **options) -> list[bytes]:
    tasks = plan_tasks([str(path) for path in inputs], None, SourceOptions(**options))
    return [text for task in tasks for part in task.slices for text in read_documents(part, text_key, bad)]


def fail(problem: BadDocument) -> None:
    raise problem


@pytest.mark.parametrize("compression", [None, *COMPRESSORS])
def test_jsonl(tmp_path: Path, compression: str | None) -> None:
    texts = TEXTS[:10] * 3 + TEXTS[11:200] if compression != "xz" else TEXTS[11:60]
    path = write_jsonl(tmp_path / "corpus.jsonl", texts)
    if compression:
        packed = path.with_name(f"corpus.jsonl.{compression}")
        packed.write_bytes(COMPRESSORS[compression](path.read_bytes()))
        path = packed
    assert read([path], task_bytes=100_000) == texts


@pytest.mark.parametrize("compression", list(COMPRESSORS))
def test_compressed_files_of_several_members(tmp_path: Path, compression: str) -> None:
    """What `cat a.gz b.gz > c.gz` makes."""
    compress = COMPRESSORS[compression]
    path = tmp_path / f"two.jsonl.{compression}"
    path.write_bytes(compress(b'{"text": "first"}\n') + compress(b'{"text": "second"}\n'))
    assert read([path]) == ["first", "second"]


@pytest.mark.parametrize("compression", list(COMPRESSORS))
def test_a_truncated_compressed_file_is_named(tmp_path: Path, compression: str) -> None:
    whole = COMPRESSORS[compression](b"".join(json.dumps({"text": str(n)}).encode() + b"\n" for n in range(5000)))
    path = tmp_path / f"cut.jsonl.{compression}"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"cut\.jsonl\.{compression}: .*(truncated or damaged|cannot read)"):
        read([path])


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(max_size=30), max_size=12),
    size=st.integers(1, 80),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
    last=st.booleans(),
)
def test_slices_of_any_size_hold_every_line_once(tmp_path_factory, texts, size, end, last) -> None:
    lines = [json.dumps({"text": text}) for text in texts]
    path = tmp_path_factory.mktemp("slices") / "corpus.jsonl"
    path.write_bytes((end.join(lines) + (end if last else "")).encode())
    found = [
        text.decode()
        for part in cut(whole_file(path, SourceOptions()), size)
        for text in read_documents(part, "text", fail)
    ]
    assert found == texts


def test_parquet_by_row_groups(tmp_path: Path) -> None:
    table = pa.table({"id": range(len(TEXTS)), "text": TEXTS, "meta": [{"source": {"body": t}} for t in TEXTS]})
    pq.write_table(table, tmp_path / "corpus.parquet", row_group_size=50)
    tasks = plan_tasks([str(tmp_path / "corpus.parquet")], None, SourceOptions(task_bytes=200_000))
    assert len(tasks) > 2
    assert read([tmp_path / "corpus.parquet"], task_bytes=200_000) == TEXTS
    assert read([tmp_path / "corpus.parquet"], "meta.source.body", task_bytes=200_000) == TEXTS


def test_saved_datasets_and_their_files(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"text": TEXTS, "meta": [{"body": text} for text in TEXTS]})
    data.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    assert read([tmp_path / "saved"]) == TEXTS
    assert read([tmp_path / "saved"], "meta.body") == TEXTS
    datasets.DatasetDict(train=data, test=data).save_to_disk(str(tmp_path / "splits"))
    assert read([tmp_path / "splits/train"]) == TEXTS
    with pytest.raises(UserError, match=r"name one of them: .*/test, .*/train"):
        read([tmp_path / "splits"])
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, data.data.schema) as writer:
        writer.write_table(data.data.table)
    assert read([tmp_path / "file.arrow"]) == TEXTS


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    table = pa.table({"id": [1], "body": ["text"]})
    pq.write_table(table, tmp_path / "corpus.parquet")
    with pytest.raises(UserError, match=r"no text column 'text'; .*'id' \(int64\), 'body' \(string\)"):
        read([tmp_path / "corpus.parquet"])
    with pytest.raises(UserError, match=r"no text column 'id'"):
        read([tmp_path / "corpus.parquet"], "id")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "corpus.parquet").read_bytes()[:-30])
    with pytest.raises(UserError, match=r"cut\.parquet: not a whole parquet file"):
        read([tmp_path / "cut.parquet"])


def test_a_null_in_a_column_is_a_bad_document(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "corpus.parquet")
    problems: list[BadDocument] = []
    assert read_raw([tmp_path / "corpus.parquet"], "text", problems.append) == [b"a", b"b"]
    assert [problem.describe() for problem in problems] == [
        f"{tmp_path}/corpus.parquet: row 2: the value of 'text' is null, a string was expected"
    ]


def test_text_files_as_files_paragraphs_and_lines(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbfOne\r\nstill one\r\n\r\n \r\n\r\nTwo\n\nThree \xc3\xa4\n")
    assert read([path]) == ["One\r\nstill one\r\n\r\n \r\n\r\nTwo\n\nThree ä\n"]
    assert read([path], text_unit="paragraphs") == ["One\r\nstill one", "Two", "Three ä"]
    for size in (1, 3, 10, 1000):
        lines = [line for line in read([path], text_unit="lines", task_bytes=size) if line.strip()]
        assert lines == ["One", "still one", "Two", "Three ä"]


def test_folders_and_globs_are_read_by_name(tmp_path: Path) -> None:
    for name in ("b/two.py", "a/one.py", "a/.hidden.py", ".git/config", "b/__pycache__/x.py", "c/data.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("l") else name)
    assert read([tmp_path]) == ["a/one.py", "b/two.py", "c/data.jsonl"]
    assert read([tmp_path / "**/*.py"]) == ["a/one.py", "b/__pycache__/x.py", "b/two.py"]
    with pytest.raises(UserError, match=r"\*\.nothing: no file matches"):
        read([tmp_path / "*.nothing"])
    with pytest.raises(UserError, match=r"missing\.jsonl: no such file or folder"):
        read([tmp_path / "missing.jsonl"])


def test_many_small_files_share_a_task(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number:03}.txt").write_text("x" * 100)
    tasks = plan_tasks([str(tmp_path)], None, SourceOptions(task_bytes=1000))
    assert [len(task.slices) for task in tasks] == [10] * 10


def test_a_byte_limit_cuts_the_input_not_a_line(tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(1000)]
    path = write_jsonl(tmp_path / "corpus.jsonl", texts)
    found = read([path], limit_bytes=path.stat().st_size // 2, task_bytes=3000)
    assert found == texts[: len(found)] and 480 < len(found) < 520


def test_nested_and_dotted_keys(tmp_path: Path) -> None:
    path = tmp_path / "nested.jsonl"
    path.write_text('{"a": {"b": {"c": "deep"}}, "a.b": "flat"}\n')
    assert read([path], "a.b.c") == ["deep"]
    assert read([path], "a.b") == ["flat"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "invalid JSON: "),
        (b"[", "invalid JSON: .*one object a line"),
        (b'{"text": "lone \\ud800 surrogate"}', "invalid JSON: "),
        (b'{"text": "\xff"}', r"invalid UTF-8 at byte 10 of the line"),
        (b'{"id": 1, "meta": {"body": "x"}}', r"no text at the key 'text'; the keys there are: 'id', 'meta\.body'"),
        (b'{"text": 5}', "the value of 'text' is a number, a string was expected"),
        (b'{"text": null}', "the value of 'text' is null, a string was expected"),
        (b'["text"]', "a list where an object with the key 'text' was expected"),
    ],
)
def test_lines_that_are_no_document(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "corpus.jsonl"
    good = b'{"text": "good"}\n'
    path.write_bytes(good * 6 + b"\n" + good + line + b"\n" + good)
    with pytest.raises(BadDocument, match=reason):
        read_raw([path], "text", fail)
    for size in (16, 60, 10_000):  # the number is right from whichever slice
        problems: list[BadDocument] = []
        assert read_raw([path], "text", problems.append, task_bytes=size) == [b"good"] * 8
        assert [problem.describe().split(": ")[0] for problem in problems] == [f"{path}, line 9"]


def test_invalid_utf8_in_text_files(tmp_path: Path) -> None:
    path = tmp_path / "latin.py"
    path.write_bytes(b"# caf\xe9\n")
    with pytest.raises(BadDocument, match="invalid UTF-8 at byte 5"):
        read([path])
    with pytest.raises(BadDocument, match="line 1: invalid UTF-8 at byte 5"):
        read([path], text_unit="lines")


def test_the_builtin_corpus_is_the_standard_library(stdlib: Path) -> None:
    tasks = plan_tasks([], "stdlib", SourceOptions())
    paths = [Path(part.path) for task in tasks for part in task.slices]
    assert stdlib / "argparse.py" in paths and len(paths) > 500
    assert not [path for path in paths if "site-packages" in path.parts or "test" in path.parts]
    assert paths != sorted(paths)
    part = replace(tasks[0].slices[0], path=str(stdlib / "argparse.py"))
    assert [*read_documents(part, "text", fail)] == [(stdlib / "argparse.py").read_bytes()]
    with pytest.raises(UserError, match="there is `stdlib`"):
        plan_tasks([], "shakespeare", SourceOptions())
